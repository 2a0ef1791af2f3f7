"""`bvpo plan` against the live tensors of real ranks.

Parameters, LoRA parameters, gradients, optimizer states and a probe's kept shards must agree to the byte on every
rank; the peak of what autograd saves during a step to 3 %, under every kind of recomputation. All rows are the same, so
that micro-batches are equally long. Experts of an EP group get different numbers of tokens and the plan assumes
equal ones, so activations are compared as the mean over the ranks of a stage, and there to 15 %: the peaks of unevenly
loaded layers are not those of the mean.

`--whole-matrix` runs all layouts; without it a part. BVPO_PLAN_TABLE=FILE writes the table of docs/plan.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_bvpo.planning.activations import Batch
from megatron_bvpo.planning.memory import saved_activations, static_memory
from megatron_bvpo.planning.model_shapes import model_shape
from megatron_bvpo.planning.reading import settings_from
from megatron_bvpo.rehearsal.tiny_models import make_tiny_model
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

RANKS = 4
SAVED, SAVED_UNEVEN = 0.03, 0.15
KINDS = ("parameters", "adapters", "reference_model", "gradients", "optimizer", "host_optimizer", "kept_shards")
LORA = dict(tuner_type="lora", lora_rank=4, lora_dropout=0)
FULL = dict(tuner_type="full")
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
NONE = dict(recompute_granularity="none")
SELECTIVE = dict(recompute_granularity="selective")
EACH = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
BLOCK = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
BF16 = dict(torch_dtype="bfloat16", bf16=True)
HOST = dict(optimizer_cpu_offload=True, use_precision_aware_optimizer=True, optimizer_offload_fraction=1)
HOST |= dict(dist_ckpt_optim_fully_reshardable=True, bvpo_alpha=0.5)
# name: (model, settings); the first ones run without --whole-matrix
LAYOUTS = {
    "moe-lora-tp2-pp2-ep2": ("moe", LORA | TP2 | PP2 | EP2 | NONE),
    "moe-full-ep4-selective": ("moe", FULL | dict(expert_model_parallel_size=4) | SELECTIVE),
    "dense-full-tp2-recomputed": ("dense", FULL | TP2 | EACH),
    "tied-full-pp2": ("tied", FULL | PP2 | NONE),
    "moe-full-tp2-ep2-bf16": ("moe", FULL | TP2 | EP2 | BF16 | EACH),
    "moe-full-tp2-ep2-optimizer-on-host": ("moe", FULL | TP2 | EP2 | BF16 | EACH | HOST),
    "moe-lora-pp2-vpp2-block": ("moe", LORA | PP2 | dict(virtual_pipeline_model_parallel_size=2) | BLOCK),
    "moe-full-tp2-pp2-ep2-selective": ("moe", FULL | TP2 | PP2 | EP2 | SELECTIVE),
    "moe-lora-ep4-recomputed": ("moe", LORA | dict(expert_model_parallel_size=4) | EACH),
    "moe-full-tp2-selective": ("moe", FULL | TP2 | SELECTIVE),
    "moe-full-cp2-ep2": ("moe", FULL | CP2 | EP2 | NONE),
    "moe-lora-tp2-ep2-router": ("moe", LORA | TP2 | EP2 | NONE | dict(target_modules="all-linear all-router")),
    "moe-lora-dp4-dropout": ("moe", LORA | NONE | dict(lora_dropout=0.1)),
    "moe-lora-experts-recomputed": ("moe", LORA | EP2 | SELECTIVE | dict(recompute_modules="core_attn moe")),
    "dense-lora-tp4-selective": (
        "dense",
        LORA | dict(tensor_model_parallel_size=4, sequence_parallel=True) | SELECTIVE,
    ),
    "dense-lora-tp2-without-sp": ("dense", LORA | dict(tensor_model_parallel_size=2) | NONE),
    "dense-full-pp2-uneven": (
        "dense",
        FULL | PP2 | NONE | dict(decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=3),
    ),
    "dense-full-no-dist-opt": ("dense", FULL | TP2 | NONE | dict(use_distributed_optimizer=False)),
    "dense-lora-cp2-tp2": ("dense", LORA | CP2 | TP2 | NONE),
    "dense-lora-attention-only": ("dense", LORA | NONE | dict(target_modules="linear_qkv linear_proj")),
    "dense-full-dp4-bf16": ("dense", FULL | BF16 | SELECTIVE),
    "tied-full-dp4-two-a-chunk": ("tied", FULL | EACH | dict(recompute_num_layers=2)),
}
DEFAULT = 6
COMMON = dict(
    micro_batch_size=2,
    global_batch_size=8,
    max_length=512,
    bvpo_alpha="auto",
    lr=1e-3,
    train_iters=2,
    logging_steps=1,
    template="qwen3_thinking",
)


def names(whole: bool) -> list[str]:
    return list(LAYOUTS)[: None if whole else DEFAULT]


def pytest_generate_tests(metafunc):
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", names(metafunc.config.getoption("--whole-matrix")))


def cpu_settings() -> dict:
    pairs = zip(CPU_FLAGS[::2], CPU_FLAGS[1::2], strict=True)
    return {key.removeprefix("--"): value for key, value in pairs}


def run_values(layout: str) -> dict:
    """Flag values of a layout's run, without its files."""
    return {**cpu_settings(), **COMMON, **LAYOUTS[layout][1]}


@pytest.fixture(scope="module")
def models(workshop, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tied = make_tiny_model(folder / "tied", kind="dense", vocab="trimmed", seed=0, tie_word_embeddings=True)
    return {"moe": workshop.moe, "dense": workshop.dense, "tied": tied}


@pytest.fixture(scope="module")
def weighed(workshop, models, tmp_path_factory, request) -> dict[str, list[dict]]:
    """For each layout, what each rank weighed."""
    folder = tmp_path_factory.mktemp("plan")
    row = workshop.train.read_text().splitlines()[0]
    rows = folder / "same.jsonl"
    rows.write_text(f"{row}\n" * 16)
    cells = []
    for name in names(request.config.getoption("--whole-matrix")):
        model = models[LAYOUTS[name][0]]
        values = run_values(name) | dict(model=model, dataset=rows)
        values["model_type"] = "qwen3_moe" if LAYOUTS[name][0] == "moe" else "qwen3"
        argv = [x for key, value in values.items() for x in (f"--{key}", *str(value).split())]
        cells.append(Cell(name, argv, hook="tests.distributed.plan_recorder:record_memory"))
    found = run_cells(RANKS, cells, folder)
    ranks = {name: [torch.load(cell.folder / f"weighed{r}.pt") for r in range(RANKS)] for name, cell in found.items()}
    if table := os.environ.get("BVPO_PLAN_TABLE"):
        write_table(table, ranks, models)
    return ranks


def planned(layout: str, models: dict[str, Path], rank: dict) -> dict[str, float]:
    """The plan's bytes for one measured rank."""
    run = settings_from(run_values(layout))
    shape = model_shape(str(models[LAYOUTS[layout][0]]))
    found = static_memory(shape, run, RANKS, rank["stage"], dp_rank=rank["dp_rank"], edp_rank=rank["edp_rank"])
    batch = Batch(rank["tokens"][0], sum(n * n for n in rank["lengths"]))
    saved, recomputed = saved_activations(shape, run, RANKS, rank["stage"], batch)
    return {**found, "activations": saved + recomputed}


def write_table(file: str, weighed: dict[str, list[dict]], models: dict[str, Path]) -> None:
    """Planned over found, for docs/plan.md."""
    rows = []
    for name, ranks in weighed.items():
        plans = [planned(name, models, rank) for rank in ranks]
        row = {"layout": name}
        for kind in (*KINDS, "activations"):
            ratios = [p[kind] / r[kind] for p, r in zip(plans, ranks, strict=True) if r[kind]]
            row[kind] = [min(ratios), max(ratios)] if ratios else None
        row["activations_mean"] = [
            sum(p["activations"] for p, r in zip(plans, ranks, strict=True) if r["stage"] == s)
            / sum(r["activations"] for r in ranks if r["stage"] == s)
            for s in sorted({r["stage"] for r in ranks})
        ]
        row["found"] = {k: max(r[k] for r in ranks) for k in (*KINDS, "activations")}
        rows.append(row)
    Path(file).write_text(json.dumps(rows, indent=1))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_bytes_are_those_of_the_live_tensors(weighed, models, layout, kind):
    for rank in weighed[layout]:
        plan, found = planned(layout, models, rank)[kind], rank[kind]
        assert plan == found, f"{layout}, rank {rank['rank']}: {kind} planned {plan}, found {found}"


def test_saved_activations_are_those_that_autograd_holds(weighed, models, layout):
    uneven = LAYOUTS[layout][1].get("expert_model_parallel_size", 1) > 1
    for stage in {rank["stage"] for rank in weighed[layout]}:
        ranks = [rank for rank in weighed[layout] if rank["stage"] == stage]
        assert len({t for rank in ranks for t in rank["tokens"]}) == 1, "micro-batches differ in length"
        plan = sum(planned(layout, models, rank)["activations"] for rank in ranks)
        found = sum(rank["activations"] for rank in ranks)
        assert plan == pytest.approx(found, rel=SAVED_UNEVEN if uneven else SAVED), (
            f"{layout}, stage {stage}: planned {plan}, found {found}"
        )


def test_nothing_is_empty(weighed, layout):
    """Ratios of nothing to nothing would pass."""
    for rank in weighed[layout]:
        lora = LAYOUTS[layout][1]["tuner_type"] == "lora"
        wanted = {"parameters", "gradients", "activations", "adapters" if lora else "reference_model"}
        wanted.add("host_optimizer" if "on-host" in layout else "kept_shards")
        assert all(rank[kind] > 0 for kind in wanted), rank
        assert rank["left"] == 0, "autograd still holds something after the step"
    assert any(rank["optimizer"] for rank in weighed[layout]) != ("on-host" in layout)
