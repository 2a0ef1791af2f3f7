"""Probes that tell nothing or go wrong: alpha holds, the log says why, the run goes on or ends, and nothing hangs."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest

from tests.distributed.forks import Run, zygotes
from tests.distributed.short_runs import flags, jsonl, row

pytestmark = pytest.mark.slow

HOOK = "tests.distributed.faulty_probes:faulty_probes"
PRIOR, STEPS = 0.3, 4
TIMEOUT = 120


def run(workshop, folder: Path, *, ranks: int = 1, fault: str | None = None, **given) -> Run:
    settings = {
        "bvpo_alpha": "auto",
        "bvpo_alpha_prior": PRIOR,
        "bvpo_criterion": "mse",
        "lora_dropout": 0,  # equal streams would differ by their masks
        "train_iters": STEPS,
        "logging_steps": 1,
        "save_steps": 100,
        "save_safetensors": "false",
        **given,
    }
    hook = {"hook": HOOK, "hook_args": {"fault": fault}} if fault else {}
    return zygotes().run(folder / "out", flags(workshop, **settings), ranks=ranks, timeout=TIMEOUT, **hook)


def log(done: Run) -> list[dict]:
    text = (done.folder / "logging.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "iteration" in line]


def alphas(done: Run) -> list[float]:
    return [line["alpha"] for line in log(done) if "alpha" in line]


def pairs_file(folder: Path, with_empty: int, without: int) -> Path:
    """Rows with both streams, and rows whose answers agree once the trace is cut off: they have no empty pair."""
    both = [row(prompt=f"What is {n}+1?") for n in range(with_empty)]  # the last ones
    traced = [
        row(chosen="<think>\nRight.\n</think>\n\n4", rejected="<think>\nWrong.\n</think>\n\n4", prompt=f"And {n}+2?")
        for n in range(without)
    ]
    (folder / "pairs.jsonl").write_bytes(jsonl(*traced, *both))
    return folder / "pairs.jsonl"


def test_identical_streams(workshop, tmp_path):
    done = run(workshop, tmp_path, fault="equal streams").require_success()
    assert alphas(done) == [pytest.approx(PRIOR)] * STEPS
    for line in log(done):
        assert line["moments/D"] == 0 and line["moments/X"] == 0 and line["moments/W"] == 0
    for step in range(1, STEPS + 1):
        assert f"The probe at step {step} is ignored: the streams' gradients are equal (D = 0)" in done.text
    assert f"α stayed at its prior 0.30: 0 probes are no evidence; {STEPS} probes ignored" in done.text


def test_a_half_without_empty_pairs(workshop, tmp_path):
    """One empty pair in four rows: one half has none."""
    done = run(workshop, tmp_path, dataset=pairs_file(tmp_path, 1, 3)).require_success()
    assert alphas(done) == [pytest.approx(PRIOR)] * STEPS
    assert not any("moments/D" in line for line in log(done))
    assert done.text.count("cannot be a probe: its halves hold (2.0, 2.0) trace and") == 1
    assert "alpha stays at 0.30 on such steps" in done.text


def test_batches_without_any_empty_pair(workshop, tmp_path):
    """Of two batches in turn the first has none: no probe there, and the second measures."""
    order = {"dataset_shuffle": "false", "train_dataloader_shuffle": "false"}
    done = run(workshop, tmp_path, dataset=pairs_file(tmp_path, 4, 4), **order).require_success()
    lines = log(done)
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert ["moments/D" in line for line in lines if "alpha" in line] == [False, True] * (STEPS // 2)
    assert alphas(done) == [pytest.approx(PRIOR)] * STEPS, "the second probe's alpha is for a fifth step"
    assert "cannot be a probe: its halves hold (2.0, 2.0) trace and (0.0, 0.0) empty pairs" in done.text


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_nan_in_one_pass_on_one_rank(number, workshop, tmp_path):
    """Step 2 teaches alpha nothing and moves nothing; step 3 and 4 measure again."""
    done = run(workshop, tmp_path, ranks=2, fault=f"NaN in pass {number}", dataset=workshop.train).require_success()
    steps = {int(line["iteration"].split("/")[0]): line for line in log(done)}
    assert "Step 2 skipped on all ranks: the gradient is not finite" in done.text
    assert "loss" not in steps[2] and "moments/D" not in steps[2]
    assert steps[1]["alpha"] == steps[3]["alpha"] == pytest.approx(PRIOR), "one probe shows no spread"
    assert steps[4]["alpha"] != pytest.approx(PRIOR, abs=1e-6), "the second good probe does"
    assert all(math.isfinite(steps[4][name]) for name in ("loss", "moments/D", "moments/X", "moments/W"))


def test_a_rank_that_fails_in_a_probe_ends_the_run(workshop, tmp_path):
    done = run(workshop, tmp_path, ranks=2, fault="raise in pass 3", dataset=workshop.train)
    assert all(code not in (0, -signal.SIGALRM) for code in done.codes), done.codes
    assert "this rank is meant to fail" in done.stderr[1]
