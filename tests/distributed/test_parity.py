"""The parity matrix: the same training on one rank and under every parallel layout, through the real pipeline.

Five steps of a tiny mixture of experts in float32 without dropout. What logging.jsonl says at each step
must agree with one rank's to 1e-5: losses of both streams, log-probs, gradient norm (relative), rewards and
margins (absolute below 1). LoRA cells start from random A and B, loaded from a file, not from B = 0, where the first
loss is ln 2 whatever the fault; those named `-start` begin as a run does, on ranks whose default generators differ.
The gradient norm must also be the norm of the gathered full gradients.

`pytest --whole-matrix` runs all cells; without it, each layout runs one tuner padding-free (two where most is
sharded), and some run padded and packed batches. docs/parity.md has the table.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.distributed.cells import CPU_FLAGS, SHIPPED_FLAGS, Cell, CellResult, run_by_ranks
from tests.distributed.full_gradients import shared_factor

TP2 = "--tensor_model_parallel_size 2 --sequence_parallel true"
PP2 = "--pipeline_model_parallel_size 2"
EP2 = "--expert_model_parallel_size 2"
CP2 = "--context_parallel_size 2"
# name: (ranks, flags)
LAYOUTS = {
    "one-rank": (1, ""),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, f"{PP2} --virtual_pipeline_model_parallel_size 2"),
    "ep2": (2, EP2),
    "cp2": (2, CP2),
    "dp2": (2, ""),
    "tp2-ep2": (2, f"{TP2} {EP2}"),
    "cp2-ep2": (2, f"{CP2} {EP2}"),
    "ep4": (4, "--expert_model_parallel_size 4"),
    "tp2-pp2-ep2": (4, f"{TP2} {PP2} {EP2}"),
}
TUNERS = {"lora": "--tuner_type lora --lora_rank 4 --lora_dropout 0", "full": "--tuner_type full"}
BATCHES = {"free": "", "padded": "--padding_free false", "packed": "--packing true --packing_length 820"}
# What GPU configurations fuse and recompute, loader workers with pinned memory.
SHIPPED = " ".join(SHIPPED_FLAGS)
# The distributed optimizer off, reduction overlapped with the backward pass, activations recomputed, the
# router trained too: each on a layout where it matters.
VARIANTS = {
    "tp2-ep2-full-no-dist-opt": ("tp2-ep2", "full", "--use_distributed_optimizer false"),
    "dp2-full-overlap": ("dp2", "full", "--overlap_grad_reduce true --overlap_param_gather true"),
    "tp2-lora-recompute": (
        "tp2",
        "lora",
        "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
    ),
    "tp2-lora-router": ("tp2", "lora", "--target_modules all-linear all-router"),
    "one-rank-lora-router": ("one-rank", "lora", "--target_modules all-linear all-router"),
    "tp2-pp2-ep2-lora-start": ("tp2-pp2-ep2", "lora", "--target_modules all-linear all-router"),
    "one-rank-lora-start": ("one-rank", "lora", "--target_modules all-linear all-router"),
    "tp2-pp2-ep2-lora-shipped": ("tp2-pp2-ep2", "lora", SHIPPED),
}
# With --whole-matrix.
MORE_VARIANTS = {
    "tp2-ep2-full-shipped": ("tp2-ep2", "full", SHIPPED),
    "dp2-full-shipped-overlap": ("dp2", "full", f"{SHIPPED} --overlap_grad_reduce true --overlap_param_gather true"),
    "pp2-vpp2-full-shipped": ("pp2-vpp2", "full", SHIPPED),
    "cp2-ep2-lora-shipped": ("cp2-ep2", "lora", SHIPPED),
    "tp2-pp2-ep2-full-shipped": ("tp2-pp2-ep2", "full", SHIPPED),
}
# In bf16, beside one rank without fusions: how far each is from float32.
BF16 = "--torch_dtype bfloat16 --bf16 true"
BF16_CELLS = {
    "one-rank-full-bf16": ("one-rank", "full", BF16),
    "tp2-ep2-full-shipped-bf16": ("tp2-ep2", "full", f"{SHIPPED} {BF16}"),
}
# Variants with a run on one rank of their own.
OWN_BASELINE = ("router", "start")
RELATIVE = ("loss", "loss/trace", "loss/empty", "grad_norm")
LOGPS = [f"{stream}logps/{side}" for stream in ("", "empty/") for side in ("chosen", "rejected")]
REWARDS = [f"{stream}rewards/{what}" for stream in ("", "empty/") for what in ("chosen", "rejected", "margins")]
STEPS = 5
TOLERANCE = 1e-5


def argv(workshop, layout: str, tuner: str, batch: str, more: str = "") -> list[str]:
    # Adam divides by the root of the squared gradient: where a gradient is rounding noise the step is
    # full-sized noise, so eps is set above the noise.
    run = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        f"--lr 1e-3 --adam_eps 1e-4 --micro_batch_size 1 --global_batch_size 4 --train_iters {STEPS} "
        "--logging_steps 1 --max_length 512 --bvpo_alpha 0.3"
    )
    flags = [*run.split(), *CPU_FLAGS, *LAYOUTS[layout][1].split(), *TUNERS[tuner].split(), *BATCHES[batch].split()]
    return flags + more.split()


def wanted(layout: str, tuner: str, batch: str, whole: bool) -> bool:
    if whole:
        return True
    odd = bool(sorted(LAYOUTS).index(layout) % 2)
    if batch == "free":
        return layout in ("tp2", "tp2-pp2-ep2") or (tuner == "lora") == odd
    return layout in ("tp2", "pp2-vpp2", "cp2", "ep2") and (tuner == "lora") == (odd == (batch == "padded"))


def cell_names(whole: bool) -> list[str]:
    return [
        f"{layout}-{tuner}-{batch}"
        for layout in LAYOUTS
        if layout != "one-rank"
        for tuner in TUNERS
        for batch in BATCHES
        if wanted(layout, tuner, batch, whole)
    ]


def baseline_of(name: str) -> str:
    _, tuner, batch, _ = split_name(name)
    own = name.rpartition("-")[2]
    return f"one-rank-{tuner}-{own if own in OWN_BASELINE else batch}"


def variants(whole: bool) -> dict[str, tuple[str, str, str]]:
    return VARIANTS | MORE_VARIANTS if whole else VARIANTS


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("--whole-matrix")
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", cell_names(whole) + [v for v in variants(whole) if not v.startswith("one-rank")])
    if "shipped" in metafunc.fixturenames:
        metafunc.parametrize("shipped", [v for v in variants(whole) if "shipped" in v])


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request) -> dict[str, CellResult]:
    whole = request.config.getoption("--whole-matrix")
    folder = tmp_path_factory.mktemp("parity")
    by_ranks: dict[int, list[Cell]] = {1: [], 2: [], 4: []}
    for tuner in TUNERS:
        for batch in BATCHES:
            by_ranks[1].append(Cell(f"one-rank-{tuner}-{batch}", argv(workshop, "one-rank", tuner, batch)))
    for name in cell_names(whole):
        layout, tuner, batch = name.rsplit("-", 2)
        by_ranks[LAYOUTS[layout][0]].append(Cell(name, argv(workshop, layout, tuner, batch)))
    for name, (layout, tuner, more) in (variants(whole) | BF16_CELLS).items():
        hook = {"hook_args": {"lora_scale": 0, "spread_seeds": True}} if name.endswith("-start") else {}
        by_ranks[LAYOUTS[layout][0]].append(Cell(name, argv(workshop, layout, tuner, "free", more), **hook))
    results = run_by_ranks(folder, by_ranks)
    if table := os.environ.get("BVPO_PARITY_TABLE"):
        Path(table).write_text(
            json.dumps(
                {name: worst(results, name) for name in results if "one-rank" not in name and "bf16" not in name}
            )
        )
    return results


def split_name(name: str) -> tuple[str, str, str, str]:
    if name in VARIANTS | MORE_VARIANTS:
        layout, tuner, more = (VARIANTS | MORE_VARIANTS)[name]
        return layout, tuner, "free", more
    return (*name.rsplit("-", 2), "")


def errors(ours: CellResult, base: CellResult) -> dict[str, float]:
    """Largest error of each logged quantity over the steps."""
    found = {}
    for key in (*RELATIVE, *LOGPS, *REWARDS):
        a, b = ours.steps(key), base.steps(key)
        assert len(a) == len(b) == STEPS, (key, len(a), len(b))
        floor = 1.0 if key in REWARDS else 0.0
        found[key] = max(abs(x - y) / max(abs(y), floor) for x, y in zip(a, b, strict=True))
    return found


def worst(runs: dict[str, CellResult], name: str) -> dict[str, float]:
    found = errors(runs[name], runs[baseline_of(name)])
    logged, true = runs[name].steps("grad_norm")[0], runs[name].recorded["true_norm"][0]
    return {
        "losses": max(found[k] for k in RELATIVE[:3]),
        "logps": max(found[k] for k in LOGPS),
        "rewards": max(found[k] for k in REWARDS),
        "grad_norm": found["grad_norm"],
        "true_norm": abs(logged - true) / true,
    }


def test_agrees_with_one_rank(runs, cell):
    base = runs[baseline_of(cell)]
    for key, error in errors(runs[cell], base).items():
        assert error <= TOLERANCE, f"{cell}: {key} differs by {error:.2e} from one rank's"


def test_grad_norm_is_the_norm_of_the_gathered_gradients(runs, cell):
    logged, true = runs[cell].steps("grad_norm")[0], runs[cell].recorded["true_norm"][0]
    assert logged == pytest.approx(true, rel=TOLERANCE)


def test_full_gradients_agree_with_one_rank(runs, cell):
    """By Hugging Face name, gathered by the exporter, not by the optimizer's shards."""
    ours = runs[cell].recorded["gradients"][0]
    base = runs[baseline_of(cell)].recorded["gradients"][0]
    assert ours.keys() == base.keys() and base
    scale = max(g.norm().item() for g in base.values())
    for name, gradient in base.items():
        difference = (ours[name] - gradient).norm().item()
        assert difference <= TOLERANCE * max(gradient.norm().item(), 1e-2 * scale), name


def test_the_shipped_flags_were_on(runs, shipped):
    """The comparisons would also hold if a flag were dropped on the way."""
    args = json.loads((runs[shipped].folder / "args.json").read_text())
    wanted = dict(zip(SHIPPED_FLAGS[::2], SHIPPED_FLAGS[1::2], strict=True))
    assert {flag: str(args[flag.lstrip("-")]).lower() for flag in wanted} == wanted
    fused = runs[shipped].recorded["written_in_place"][0]
    lora = "-lora-" in shipped
    for part in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        assert any(f"{part}.lora_A" in n if lora else f"{part}.weight" in n for n in fused), part
    assert not any(part in n for n in fused for part in ("layer_norm_weight", "embedding", "output_layer"))
    assert runs["one-rank-full-free"].recorded["written_in_place"] == [[]]


def test_shipped_flags_in_bf16_are_as_near_to_float32_as_one_plain_rank(runs):
    """Three times its distance at the most, as all bounds here: sums in another order."""
    exact = runs["one-rank-full-free"]

    def distances(name: str) -> tuple[float, float]:
        found, base = runs[name].recorded["gradients"][0], exact.recorded["gradients"][0]
        gradient = sum((found[n] - base[n]).square().sum().item() for n in base) ** 0.5
        keys = (*RELATIVE[:3], *LOGPS)
        values = [(a - b) / b for key in keys for a, b in zip(runs[name].steps(key), exact.steps(key), strict=True)]
        return gradient / exact.recorded["true_norm"][0], sum(v * v for v in values) ** 0.5

    plain, shipped = distances("one-rank-full-bf16"), distances("tp2-ep2-full-shipped-bf16")
    for ours, theirs in zip(shipped, plain, strict=True):
        assert 0 < theirs < 0.1 and ours <= 3 * theirs, (shipped, plain)


def test_the_runs_train(runs):
    """The comparisons above would also hold for runs that do nothing."""
    base = runs["one-rank-full-free"]
    assert base.steps("loss")[-1] < base.steps("loss")[0] - 0.05
    assert len({round(v, 6) for v in base.steps("logps/chosen")}) == STEPS
    assert runs["one-rank-lora-free"].steps("rewards/margins")[0] != 0
    start = runs["one-rank-lora-start"]
    assert start.steps("rewards/margins")[0] == 0 and start.steps("loss")[-1] < start.steps("loss")[0] - 0.01


@pytest.mark.parametrize("name", ["one-rank-lora-start", "tp2-pp2-ep2-lora-start"])
def test_a_adapts_as_pefts_own_does(runs, name):
    """Every A is uniform in ±1/√inputs of the whole layer, no two alike but those that Megatron keeps as one."""
    start = runs[name].recorded["start"]
    factors = {n: t for n, t in start.items() if "lora_A" in n}
    assert len(factors) > 100 and all(not t.any() for n, t in start.items() if "lora_B" in n)
    for n, t in factors.items():
        bound = t.shape[1] ** -0.5
        assert t.abs().max() <= bound, n
        assert t.std().item() == pytest.approx(bound / 3**0.5, rel=0.25), n
    assert len({tuple(t.flatten()[:4].tolist()) for t in factors.values()}) == len({shared_factor(n) for n in factors})
