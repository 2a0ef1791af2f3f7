"""A run that is asked to stop saves the step it is in, ends in order, and goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.forks import zygotes
from tests.distributed.test_resume import (
    KINDS,
    STEPS,
    argv,
    assert_same,
    last_checkpoint,
    read_records,
    resume,
    start,
)

pytestmark = pytest.mark.slow

STOPPER = "tests.distributed.stop_recorder:stop_exactly"
KIND = "lora-float32-dp2"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stop")


@pytest.fixture(scope="module")
def whole(workshop, home):
    run, records = start(workshop, home / "whole", KIND)
    run.require_success()
    return records


@pytest.mark.parametrize("how, rank", [("SIGUSR1", 1), ("SIGTERM", 0), ("the file", 0)])
def test_asked_to_stop_on_one_rank_all_save_and_the_run_goes_on_exactly(workshop, home, whole, how, rank):
    folder, stop_file = home / how.replace(" ", "-"), home / f"{how} stop".replace(" ", "-")
    hook_args = {"in_step": 3, "rank": rank, "how": how if how.startswith("SIG") else str(stop_file)}
    env = {"BVPO_STOP_FILE": str(stop_file)}
    ranks = KINDS[KIND][0]
    run = zygotes().run(
        folder, argv(workshop, KIND), ranks=ranks, hook=STOPPER, hook_args=hook_args, env=env, timeout=240
    )
    run.require_success()  # an orderly end: torchrun would else kill the ranks that are still saving
    records = read_records(run)
    assert [sorted(r.steps) for r in records] == [[1, 2, 3]] * ranks, "not all ranks stopped after the same step"
    assert all(3 in r.saves for r in records), "3 is no multiple of --save_steps, so only the request saves it"
    assert last_checkpoint(folder) == "checkpoint-3"
    assert f"Stopped on request after step 3 of {STEPS}" in run.text
    note = json.loads(Path(f"{stop_file}.done").read_text())
    assert note == {"iteration": 3, "train_iters": STEPS, "checkpoint": f"{folder}/checkpoint-3"}

    run, resumed = resume(workshop, folder, KIND, 3)
    run.require_success()
    assert_same(resumed, whole, 4, STEPS)
    assert [r.end for r in resumed] == [r.end for r in whole]
