"""Probe steps beside one-pass steps where a step is more than its preference gradient: dropout, the router's losses,
its bias and its counters, and pipeline stages without a router.

Tiny models are made here: a mixture of experts with a bias (sigmoid scores, as in DeepSeek-V3), and one whose first
layer is dense.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.cells import CPU_FLAGS, Cell, CellResult, run_beside, run_cells

RECORDERS = "tests.distributed.router_recorder"
PRIOR, STEPS, SEEDS = 0.3, 3, 40
BIAS_RATE = 1e-3  # Megatron's moe_router_bias_update_rate
MOMENTS = ("moments/D", "moments/X", "moments/W")
EVERYTHING = "--moe_router_load_balancing_type aux_loss --moe_aux_loss_coeff 0.01 --moe_z_loss_coeff 0.01"
ODD = "--global_batch_size 3"  # no whole halves: four passes over all micro-batches
PP2 = "--pipeline_model_parallel_size 2"
SIZES = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4)


@dataclass(frozen=True)
class Shop:
    """Folders of the models, and files of rows."""

    plain: Path
    biased: Path
    dense_first: Path
    rows: Path
    short_rows: Path


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def with_expert_bias(source: Path, target: Path) -> Path:
    """The model with sigmoid scores and a bias of each expert, under Megatron-bridge's Hugging Face name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    edit_config(target, scoring_func="sigmoid", moe_router_enable_expert_bias=True)
    tensors = load_file(target / "model.safetensors")
    for layer in range(2):
        bias = 0.05 * torch.randn(SIZES["num_experts"], generator=torch.Generator().manual_seed(layer))
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = bias
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_dense_first_layer(source: Path, target: Path) -> Path:
    import transformers

    shutil.copytree(source, target)
    edit_config(target, mlp_only_layers=[0])
    config = transformers.AutoConfig.from_pretrained(target)
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(target)
    edit_config(target, first_k_dense_replace=1)  # how other models say it, and what the bridge reads
    return target


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    from megatron_bvpo.rehearsal.sample_data import make_sample_rows
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("router")
    plain = make_tiny_model(folder / "plain", num_layers=2, moe_intermediate_size=16, **SIZES)
    rows = sorted(make_sample_rows(16, seed=1), key=lambda row: len(json.dumps(row)))
    for name, part in (("rows", rows), ("short_rows", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return Shop(
        plain=plain,
        biased=with_expert_bias(plain, folder / "biased"),
        dense_first=with_dense_first_layer(plain, folder / "dense_first"),
        rows=folder / "rows.jsonl",
        short_rows=folder / "short_rows.jsonl",
    )


def argv(model: Path, rows: Path, alpha: str, more: str) -> list[str]:
    run = (
        f"--model {model} --model_type qwen3_moe --template qwen3_thinking --dataset {rows} --lr 1e-3 "
        f"--adam_eps 1e-4 --micro_batch_size 1 --global_batch_size 4 --train_iters {STEPS} --logging_steps 1 "
        f"--max_length 512 --bvpo_alpha {alpha} --bvpo_alpha_prior {PRIOR} --tuner_type full"
    )
    return [*run.split(), *CPU_FLAGS, *more.split()]


@pytest.fixture(scope="module")
def runs(shop, tmp_path_factory) -> dict[str, CellResult]:
    def biased(name: str, alpha: str, more: str = EVERYTHING, **hook_args) -> Cell:
        hook = f"{RECORDERS}:record_router"
        flags = argv(shop.biased, shop.rows, alpha, more)
        # A bias that moves within a step makes another policy of the first one: the canaries say so, too.
        moves = hook_args.get("mutation") == "bias moves in every pass"
        return Cell(name, flags, hook=hook, hook_args=hook_args, canaries=moves)

    def dense_first(name: str, more: str = "") -> Cell:
        flags = argv(shop.dense_first, shop.rows, "auto", f"{EVERYTHING} {more}")
        return Cell(name, flags, hook="tests.distributed.recorders:record_first_step")

    dropout = "--tuner_type lora --lora_rank 2 --lora_dropout 0.5 --global_batch_size 2 --train_iters 1 --beta 0.5"
    over_seeds = Cell(
        "over-seeds",
        argv(shop.plain, shop.short_rows, "auto", dropout),
        hook=f"{RECORDERS}:record_over_seeds",
        hook_args={"seeds": SEEDS},
    )
    folder = tmp_path_factory.mktemp("router-runs")
    one_rank = [
        over_seeds,
        biased("probe", "auto"),
        biased("one-pass", str(PRIOR)),
        biased("probe-without-losses", "auto", ""),
        biased("probe-odd", "auto", f"{EVERYTHING} {ODD}"),
        biased("one-pass-odd", str(PRIOR), f"{EVERYTHING} {ODD}"),
        biased("bias-in-every-pass", "auto", mutation="bias moves in every pass"),
        biased("losses-in-every-pass", "auto", mutation="router losses in every pass"),
        dense_first("dense-first"),
    ]
    two_ranks = [
        biased("probe-ep2", "auto", f"{EVERYTHING} --expert_model_parallel_size 2"),
        dense_first("dense-first-pp2", PP2),
    ]
    return run_beside(folder, one_rank[:1], one_rank[1:]) | run_cells(2, two_ranks, folder, timeout=240)


def router(result: CellResult) -> dict:
    return torch.load(result.folder / "router.pt", weights_only=False)


# ---------------------------------------------------------------------- dropout


def z_scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Difference of the means of two [seeds, E] in standard errors, for elements that vary."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return ((a.mean(0) - b.mean(0)) / error)[a.std(0) > 0]


def spread(gradients: torch.Tensor) -> float:
    """Median distance from the mean. Its mean square is ruled by a few masks with large gradients."""
    return (gradients - gradients.mean(0)).norm(dim=1).median().item()


@pytest.fixture(scope="module")
def over_seeds(runs) -> dict[str, torch.Tensor]:
    return torch.load(runs["over-seeds"].folder / "seeds.pt")


def test_the_mean_over_dropout_masks_is_that_of_a_one_pass_step(over_seeds):
    """Over a thousand elements, no |z| above 5: were the means equal, chance would exceed that once in a thousand
    times."""
    z = z_scores(over_seeds["one_pass"], over_seeds["probe"])
    assert len(z) > 1000
    assert z.abs().max() < 5 and z.square().mean().sqrt() < 1.5


def test_the_passes_of_a_probe_draw_masks_as_one_pass_does(over_seeds):
    ratio = spread(over_seeds["probe"]) / spread(over_seeds["one_pass"])
    assert 0.5 < ratio < 2
    without = spread(over_seeds["broken"]) / spread(over_seeds["one_pass"])
    assert without < 0.01, "a probe whose passes have no dropout is the same for every seed, and is noticed here"
    torch.testing.assert_close(over_seeds["broken"][0], over_seeds["plain"], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- the router's bias, counters and losses


@pytest.mark.parametrize(("probe", "one_pass"), [("probe", "one-pass"), ("probe-odd", "one-pass-odd")])
def test_the_expert_bias_moves_once_a_step_and_as_in_one_pass(runs, probe, one_pass):
    ours, base = router(runs[probe]), router(runs[one_pass])
    assert ours["updates"] == base["updates"] == [1] * STEPS
    for step in range(STEPS):
        assert len(ours["bias"][step]) == 2
    for mine, theirs in zip(ours["bias"][0], base["bias"][0], strict=True):
        assert torch.equal(mine, theirs)
    for before, after in zip(ours["bias"][0], ours["bias"][1], strict=True):
        moved = (after - before).abs()
        assert moved.max() > 0 and ((moved - BIAS_RATE).abs().lt(1e-6) | (moved == 0)).all()


def test_each_token_is_counted_once(runs):
    ours, base = router(runs["probe"])["counts"][0], router(runs["one-pass"])["counts"][0]
    for mine, theirs in zip(ours, base, strict=True):
        assert torch.equal(mine, theirs) and mine.sum() > 0


def test_the_bias_is_one_ranks_under_expert_parallelism(runs):
    ours, base = router(runs["probe-ep2"]), router(runs["probe"])
    assert ours["updates"] == [1] * STEPS
    for mine, theirs in zip(ours["bias"][0], base["bias"][0], strict=True):
        assert torch.equal(mine, theirs)


def largest_error(ours: dict, base: dict) -> float:
    scale = max(g.norm().item() for g in base.values())
    return max((ours[n] - g).norm().item() / max(g.norm().item(), 1e-2 * scale) for n, g in base.items())


@pytest.mark.parametrize(("probe", "one_pass"), [("probe", "one-pass"), ("probe-odd", "one-pass-odd")])
def test_auxiliary_and_z_loss_enter_once(runs, probe, one_pass):
    ours, base = (runs[name].recorded["gradients"][0] for name in (probe, one_pass))
    assert largest_error(ours, base) < 1e-5
    for name in ("load_balancing_loss", "z_loss"):
        assert runs[probe].steps(name)[0] == pytest.approx(runs[one_pass].steps(name)[0], rel=1e-5), name


def test_no_router_loss_is_in_a_moment(runs):
    for key in MOMENTS:
        assert runs["probe"].steps(key)[0] == pytest.approx(runs["probe-without-losses"].steps(key)[0], rel=1e-5)


def test_a_bias_that_moves_in_every_pass_is_noticed(runs):
    broken, base = router(runs["bias-in-every-pass"]), router(runs["one-pass"])
    assert broken["updates"][0] > 1
    assert any(not torch.equal(a, b) for a, b in zip(broken["bias"][0], base["bias"][0], strict=True))


def test_router_losses_in_every_pass_are_noticed(runs):
    broken, base = (runs[name].recorded["gradients"][0] for name in ("losses-in-every-pass", "one-pass"))
    assert largest_error(broken, base) > 1e-3


# ---------------------------------------------------------------------- what a probe communicates


def test_a_probe_measures_with_one_reduction_of_four_numbers(runs):
    """Beside Megatron's own in its passes. The halves are agreed on by two more; the check that all is finite and
    the metrics are every step's."""
    first = ["any_rank", "largest_over_ranks", "reduced_metrics"]  # the canaries', once
    later = ["any_rank", "reduced_metrics"]
    for name in ("probe", "probe-ep2"):
        for step, found in enumerate(router(runs[name])["reductions"]):
            assert [call for call in found if call[0] == "measure_grams"] == [("measure_grams", 4)]
            assert found[:2] == [("any_rank", 1), ("_count_halves", 6)]
            assert [call[0] for call in found[3:]] == (later if step else first)
    one_pass = router(runs["one-pass"])["reductions"][0]
    assert [call[0] for call in one_pass] == ["_factors", *first]


# ---------------------------------------------------------------------- pipeline stages without a router


def test_a_stage_without_a_router_takes_part_in_probes(runs):
    """Stage 0 has no router and must run the fifth pass too; were it left out, the run would hang."""
    ours, base = runs["dense-first-pp2"], runs["dense-first"]
    for key in (*MOMENTS, "loss", "load_balancing_loss", "z_loss"):
        assert len(ours.steps(key)) == STEPS, key
        scale = base.steps("moments/D") if key == "moments/X" else base.steps(key)
        for a, b, s in zip(ours.steps(key), base.steps(key), scale, strict=True):
            assert abs(a - b) <= 1e-4 * abs(s), key
    assert largest_error(ours.recorded["gradients"][0], base.recorded["gradients"][0]) < 1e-5
