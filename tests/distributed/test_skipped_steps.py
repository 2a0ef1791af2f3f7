"""A loss or gradient that is not finite: the step is skipped on all ranks alike, before anything advances."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.distributed.forks import Run, zygotes
from tests.distributed.test_resume import BF16, RECORDER, argv

pytestmark = pytest.mark.slow

HOOK = "tests.distributed.poison:poisoned"
PP2 = "--pipeline_model_parallel_size 2"
FP16 = "--fp16 true --torch_dtype float16"
STEPS = 5
SKIPPED = 2
# name: (where the NaN is put, flags beside LoRA's, hook arguments)
CASES = {
    "trace": ("trace", "", {}),
    "empty": ("empty", "", {"value": math.inf}),
    "gradient-of-one-rank": ("gradient", "", {}),
    "hidden": ("hidden", "--moe_aux_loss_coeff 0.01", {}),
    "trace-bf16-pp2": ("trace", f"{PP2} {BF16}", {}),
    "gradient-of-the-first-stage": ("gradient", PP2, {"rank": 0}),
    "empty-in-a-probe": ("empty", "--bvpo_alpha auto", {}),
}


def start(workshop, folder: Path, more: str, **hook_args) -> Run:
    flags = argv(workshop, "lora-float32-dp2", f"{more} --train_iters {STEPS} --save_steps 100 --eval_iters 0")
    return zygotes().run(folder, flags, ranks=2, hook=HOOK, hook_args=hook_args)


def lines(run: Run, rank: int, key: str) -> dict[int, dict]:
    """This rank's recorded lines that have `key`, by its value."""
    text = Path(f"{run.folder}.out", f"exact{rank}.jsonl").read_text()
    return {line[key]: line for line in map(json.loads, text.splitlines()) if key in line}


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory) -> dict[str, Run]:
    home = tmp_path_factory.mktemp("skipped")
    return {
        name: start(workshop, home / name, more, where=where, steps=[SKIPPED], **given).require_success()
        for name, (where, more, given) in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_nothing_advances_on_any_rank(runs, case):
    for rank in range(2):
        steps, states = lines(runs[case], rank, "step"), lines(runs[case], rank, "state")
        before = {n: steps[n]["before"]["parameters"] for n in steps}
        assert list(steps) == list(range(1, STEPS + 1)), "training did not go on"
        for step in range(1, STEPS):
            here, after = states[step], states[step + 1]
            moved = (
                before[step + 1] != before[step],
                after["optimizer"] != here["optimizer"],
                after["scheduler"] != here["scheduler"],
            )
            # The first step of the warm-up has a learning rate of 0.
            assert moved == ((step != SKIPPED,) * 3 if step > 1 else (False, True, True)), f"rank {rank}, step {step}"


@pytest.mark.parametrize("case", CASES)
def test_the_log_says_what_and_which_rows(runs, case):
    where = CASES[case][0]
    told = [line for line in runs[case].stderr[0].splitlines() if "skipped on all ranks" in line]
    assert len(told) == 1 and f"Step {SKIPPED} skipped" in told[0]
    if where in ("trace", "empty"):
        row = next(iter(lines(runs[case], 1, "poisoned")))
        assert f"the loss is not finite for row {row} ({where} stream)" in told[0]
    elif where == "gradient":
        assert "the gradient is not finite" in told[0]
    else:
        assert re.search(r"not finite for row \d+ \(empty stream\), row \d+ \(trace stream\)", told[0])
    assert "Parameters, optimizer and schedule are as before" in told[0] and "Rows of this step: [" in told[0]


@pytest.mark.parametrize("case", CASES)
def test_no_later_metric_is_touched(runs, case):
    log = [json.loads(line) for line in (runs[case].folder / "logging.jsonl").read_text().splitlines()]
    log = [line for line in log if "iteration" in line]
    assert len(log) == STEPS
    for line in log:
        step = int(line["iteration"].split("/")[0])
        numbers = {k: v for k, v in line.items() if isinstance(v, float)}
        bad = {k: v for k, v in numbers.items() if not math.isfinite(v)}
        assert not bad, f"step {step}: {bad}"
        assert ("loss" in line) == (step != SKIPPED)


def test_a_window_of_several_steps_is_not_touched_either(workshop, tmp_path):
    flags = "--logging_steps 3 --moe_aux_loss_coeff 0.01"
    run = start(workshop, tmp_path / "window", flags, where="hidden", steps=[SKIPPED]).require_success()
    log = lines(run, 1, "log")
    assert list(log) == [1, 3]
    assert all(math.isfinite(float.fromhex(log[3][k])) for k in ("loss", "load_balancing_loss"))


def test_too_many_in_a_row_stop_the_run(workshop, tmp_path):
    hook = {"where": "trace", "steps": [1, 3, 4, 5], "stop_after": 3}
    run = start(workshop, tmp_path / "stopped", "--train_iters 9", **hook)
    assert run.codes == [2, 2]
    assert list(lines(run, 0, "state")) == [1, 2, 3, 4, 5], "one good step between them begins the count anew"
    last = run.stderr[0].strip().splitlines()[-1]
    assert last.startswith("megatron-bvpo: error: 3 steps in a row without a finite gradient") and "--lr" in last


def test_an_overflow_under_fp16_lowers_the_loss_scale_and_the_run_goes_on(workshop, tmp_path):
    """Two overflows in a row halve the scale; a step that is not taken moves neither weights nor schedule."""
    flags = argv(workshop, "lora-float32-dp2", f"{FP16} --train_iters 8 --save_steps 100 --eval_iters 0")
    hook_args = {"loss_scale": 2.0**21}  # the scale falls to about 2¹⁸ here
    run = zygotes().run(tmp_path / "fp16", flags, hook=RECORDER, hook_args=hook_args).require_success()
    steps = lines(run, 0, "step").values()
    taken = [float.fromhex(step["grad_norm"]) > 0 for step in steps]
    first = taken.index(True)
    assert first > 1 and taken == [False] * first + [True] * (8 - first)
    scales = [float.fromhex(step["loss_scale"]) for step in steps]
    assert scales[:first] == [2.0 ** (21 - n) for n in range(first)] and set(scales[first:]) == {scales[first - 1]}
    weights, rates = ([step[what] for step in steps] for what in ("before", "lr"))
    weights = [before["parameters"] for before in weights]
    assert len(set(weights[: first + 1])) == 1 and weights[-1] != weights[0]
    assert len(set(rates[:first])) == 1 and rates[first] != rates[0]
    told = [line for line in run.stderr[0].splitlines() if "not taken: fp16 overflowed" in line]
    assert len(told) == first and "Step 2 not taken: fp16 overflowed; the loss scale is 1048576 now." in told[1]
