"""`early_stop_interval`: where a run ends, what it keeps, and that a resumed run ends at the same step.

The loss falls from save to save. With --greater_is_better true the first is the best one, and the third save the second
in a row that is not better.
"""

from __future__ import annotations

import pytest

from tests.distributed import oracle_runs
from tests.distributed.cells import Cell, run_cells

END = 3


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("early-stop")
    flags = (
        f"{oracle_runs.RUN} {oracle_runs.dense(workshop)} --dataset {workshop.train} --val_dataset {workshop.held_out} "
        f"{oracle_runs.LORA} --lr 2e-3 --bvpo_alpha 0.3 --global_batch_size 4 --train_iters 6 --save_steps 1 "
        "--eval_steps 1 --merge_lora false --metric_for_best_model loss --greater_is_better true"
    )

    def cell(name: str, more: str) -> Cell:
        cell = oracle_runs.cell(name, f"{flags} {more}", hook_args={"save": True, "gradients": False})
        cell.hook = "tests.distributed.recorders:record_first_step"
        return cell

    def resumed(step: int) -> str:
        return f"--mcore_adapter {folder}/whole/checkpoint-{step} --finetune false"

    cells = [
        cell("whole", "--early_stop_interval 2"),
        cell("few", "--early_stop_interval 2 --save_total_limit 2"),
        cell("resumed", f"--early_stop_interval 2 {resumed(2)}"),
        cell("again", f"--early_stop_interval 2 {resumed(3)}"),
        cell("patient", f"--early_stop_interval 4 {resumed(3)}"),
        cell("falling", "--early_stop_interval 1 --greater_is_better false --train_iters 4"),
    ]
    return run_cells(1, cells, folder)


def steps(run) -> list[int]:
    return [int(line["iteration"].split("/")[0]) for line in run.log if "loss" in line]


def saved(run) -> list[str]:
    return sorted(p.name for p in run.folder.glob("checkpoint-*"))


def test_it_ends_behind_the_save_that_is_one_too_many(runs):
    assert steps(runs["whole"]) == [1, 2, 3]
    assert saved(runs["whole"]) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_stays(runs):
    assert saved(runs["few"]) == ["checkpoint-1", "checkpoint-3"]


def test_a_metric_that_gets_better_ends_nothing(runs):
    assert steps(runs["falling"]) == [1, 2, 3, 4]


def test_a_resumed_run_ends_where_the_whole_one_does(runs):
    whole, resumed = (
        [line for line in runs[name].log if line.get("iteration", "").startswith("3/")] for name in ("whole", "resumed")
    )
    assert steps(runs["resumed"]) == [END]
    assert len(whole) == len(resumed) == 2, "a step and its evaluation"
    for one, other in zip(whole, resumed, strict=True):
        told = one.keys() - {"elapsed_time", "remaining_time", "train_speed(s/it)", "memory(GiB)"}
        assert {key: one[key] for key in told} == {key: other[key] for key in told}


def test_a_run_that_has_ended_trains_no_further(runs):
    assert steps(runs["again"]) == []


def test_more_patience_goes_on(runs):
    assert steps(runs["patient"]) == [4, 5]
