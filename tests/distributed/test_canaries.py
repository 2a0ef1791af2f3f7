"""Faults that nothing else shows, planted in real runs: each is told once, by its own words, and a sound run is silent.

That a sound run is silent in every layout is asserted in every cell of the other files (cell_worker.py).
"""

from __future__ import annotations

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, CellResult, run_beside, run_cells

PLANT = "tests.distributed.canary_recorder"
TP2 = "--tensor_model_parallel_size 2 --sequence_parallel true"
EP2 = "--expert_model_parallel_size 2"
PP2 = "--pipeline_model_parallel_size 2"
LORA = "--tuner_type lora --lora_rank 4 --lora_dropout 0"
BF16 = "--torch_dtype bfloat16 --bf16 true"
# In the base class of each: what a fault's own line says, or None for silence.
REFERENCE_FAULTS = {
    "adapters_on": "not switched off in the reference's forward",
    "swapped_halves": "the two halves of the output are swapped",
    "adapters_off": "do not depend on what is trained",
}
FACTOR = "linear_qkv.lora_A.default.weight"
COPIES = {
    "norm": "pre_mlp_layernorm.weight",
    "factor": FACTOR,
    "expert": "experts.linear_fc1.lora_A.default.weight0",
    "shard": "linear_qkv.lora_B.default.weight",
}


def cell(workshop, name: str, more: str, hook: str = "plant_in_reference", may_fail: bool = False, **hook_args) -> Cell:
    run = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        "--lr 1e-3 --micro_batch_size 1 --global_batch_size 4 --train_iters 1 --logging_steps 1 --max_length 512"
    )
    flags = [*run.split(), *CPU_FLAGS, *more.split()]
    return Cell(name, flags, hook=f"{PLANT}:{hook}", hook_args=hook_args, may_fail=may_fail, canaries=True)


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory) -> dict[str, CellResult]:
    folder = tmp_path_factory.mktemp("canaries")
    lora, cache = [*REFERENCE_FAULTS], f"--bvpo_ref_cache {folder / 'cache'}"
    full = ["adapters_on", "swapped_halves", "other_reference"]
    one = [
        cell(
            workshop,
            "lora",
            f"{LORA} {cache} --target_modules all-linear all-router",
            faults=[*lora, "damaged_cache", "router_on"],
            flush_steps=1,
        ),
        cell(workshop, "lora-bf16", f"{LORA} {BF16} --bvpo_alpha 0.5", faults=lora),
        cell(workshop, "full", "--tuner_type full", faults=full),
        cell(workshop, "dropout", f"{LORA} --lora_dropout 0.1", faults=["adapters_on"]),
        cell(workshop, "live-dropout", LORA, faults=[], live_dropout=0.1),
    ]
    found = run_beside(folder, one[:2], one[2:])
    copies = {**{name: (part, 1e-3) for name, part in COPIES.items()}, "rounding": (FACTOR, 1e-8)}
    two = [
        cell(workshop, "own-draws", f"{LORA} {TP2}", "own_draws", may_fail=True),
        cell(workshop, "tp2", f"{LORA} {TP2}", "plant_in_copies", faults=copies, at_save=copies["factor"]),
        cell(workshop, "ep2", f"{LORA} {EP2}", "plant_in_copies", faults=copies),
        cell(workshop, "pp2", f"{LORA} {PP2}", faults=["adapters_on", "swapped_halves", "swapped_between_stages"]),
    ]
    found.update(run_cells(2, two, folder))
    return found


def told(run: CellResult, fault: str = "") -> list[str]:
    return run.recorded["told"][fault]


@pytest.mark.parametrize("name", ["lora", "lora-bf16", "full", "dropout", "pp2"])
def test_a_sound_first_step_is_silent(runs, name):
    assert told(runs[name]) == []


@pytest.mark.parametrize("name", ["lora", "lora-bf16"])
@pytest.mark.parametrize("fault, words", REFERENCE_FAULTS.items())
def test_a_fault_of_the_reference_is_told_at_b_0(runs, name, fault, words):
    """In the step itself there is nothing to see: with B = 0 every margin is 0 all the same."""
    assert runs[name].steps("rewards/margins") == [0.0]
    lines = told(runs[name], fault)
    assert len(lines) == 1 and words in lines[0] and "docs/troubleshooting.md" in lines[0]


@pytest.mark.parametrize(
    "fault, words",
    {
        "adapters_on": "Likely: they share weights",
        "swapped_halves": "the two halves of the output are swapped",
        "other_reference": "policy and reference are one model at the start, and do not agree",
    }.items(),
)
def test_full_tuning(runs, fault, words):
    lines = told(runs["full"], fault)
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("fault", ["adapters_on", "swapped_halves", "swapped_between_stages"])
def test_in_a_pipeline(runs, fault):
    assert len(told(runs["pp2"], fault)) == 1


def test_a_part_of_the_adapters_left_on(runs):
    lines = told(runs["lora"], "router_on")
    assert len(lines) == 1 and "the reference moves with the policy's weights" in lines[0]


def test_a_cache_of_another_reference(runs):
    lines = told(runs["lora"], "damaged_cache")
    assert len(lines) == 1 and "cached log-probs of the reference" in lines[0] and "up to 1 nats" in lines[0]


def test_dropout_that_was_asked_for_hides_no_fault(runs):
    assert len(told(runs["dropout"], "adapters_on")) == 1


def test_noise_that_nobody_asked_for(runs):
    lines = told(runs["live-dropout"])
    assert len(lines) == 1 and "noise is live in the policy's training forward" in lines[0]


@pytest.mark.parametrize("name", ["lora", "full", "pp2"])
def test_the_first_step_is_left_as_it_was(runs, name):
    """Parameters, gradients, random states, and which modules train: bit for bit, after faults too."""
    assert runs[name].recorded["left_as_it_was"]


@pytest.mark.parametrize("name, most", [("lora", 2), ("full", 2), ("pp2", 2), ("lora-bf16", 6)])
def test_it_costs_a_few_forwards_of_a_micro_batch_once(runs, name, most):
    """In float32 the least shake shows."""
    forwards, references = runs[name].recorded["cost"]
    assert 2 <= forwards == references <= most


def differing(run: CellResult, fault: str) -> dict[str, tuple]:
    return {d["name"]: d["ranks"] for d in run.recorded["found"][fault]}


@pytest.mark.parametrize("name, shared", [("tp2", {"norm", "factor", "expert"}), ("ep2", {"norm", "factor", "shard"})])
def test_a_changed_copy_is_named_with_its_ranks(runs, name, shared):
    """Under TP 2, B of the attention's input is cut; under EP 2 (and DP 2) each rank has its own experts."""
    assert differing(runs[name], "") == {}
    for fault, part in COPIES.items():
        found = differing(runs[name], fault)
        if fault not in shared:
            assert found == {}, fault
            continue
        ((where, ranks),) = found.items()
        assert where.endswith(part) and ranks == ((0,), (1,)), fault
        (difference,) = runs[name].recorded["found"][fault]
        assert difference["apart"] == pytest.approx(1e-3, rel=1e-3) and not difference["rounding"]


def test_rounding_is_told_apart(runs):
    (difference,) = runs["tp2"].recorded["found"]["rounding"]
    assert difference["rounding"] and 0 < difference["apart"] < 2e-8


def test_what_bridge_draws_is_refused_where_default_seeds_differ(runs):
    """Without host/lora_start.py. The layers whose A tensor parallelism cuts are right to differ."""
    error = runs["own-draws"].error.strip().splitlines()[-1]
    assert "UserError: ranks that must begin with the same weights do not" in error
    assert ".lora_A.default.weight" in error and "between ranks 0 | 1" in error and "more parameters" in error
    assert not runs["own-draws"].log


def test_a_drift_is_told_at_the_save_which_is_written(runs):
    (line,) = runs["tp2"].recorded["told"]
    assert "have drifted apart" in line and FACTOR in line and "ranks 0 | 1" in line
    assert (runs["tp2"].folder / "last-checkpoint" / "bvpo_state.json").is_file()
