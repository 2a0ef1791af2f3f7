"""Going on in another layout: the estimate of alpha is the same, and the losses agree to 1e-5."""

from __future__ import annotations

import json

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, run_cells
from tests.distributed.test_parity import LAYOUTS

HOOK_ARGS = {"gradients": False, "save": True}
WHERE = "tp2-ep2"


def argv(workshop, layout: str, more: str) -> list[str]:
    run = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        "--tuner_type lora --lora_rank 4 --lora_dropout 0 --lr 1e-3 --lr_decay_style constant --adam_eps 1e-4 "
        "--micro_batch_size 1 --global_batch_size 4 --train_iters 6 --logging_steps 1 --max_length 512 "
        f"--bvpo_alpha auto --save_steps 3 --merge_lora false {more}"
    )
    return [*run.split(), *CPU_FLAGS, *LAYOUTS[layout][1].split()]


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    whole = "--dist_ckpt_optim_fully_reshardable true"
    first = [
        Cell("whole", argv(workshop, "ep2", whole), hook_args=HOOK_ARGS),
        Cell("plain", argv(workshop, "ep2", "--train_iters 3"), hook_args=HOOK_ARGS),
    ]
    found = run_cells(2, first, folder)
    again = "--finetune false --mcore_adapter"
    cells = [
        Cell(
            "moved", argv(workshop, WHERE, f"{whole} {again} {folder / 'whole' / 'checkpoint-3'}"), hook_args=HOOK_ARGS
        ),
        Cell("refused", argv(workshop, WHERE, f"{again} {folder / 'plain' / 'checkpoint-3'}"), may_fail=True),
    ]
    found.update(run_cells(2, cells, folder))
    alone = f"{whole} {again} {folder / 'whole' / 'checkpoint-3'}"
    found.update(run_cells(1, [Cell("no-experts", argv(workshop, "one-rank", alone), may_fail=True)], folder))
    return found


def state(result, step: int) -> dict:
    return json.loads((result.folder / f"checkpoint-{step}" / "bvpo_state.json").read_text())


def test_losses_and_alpha_go_on_as_before(runs):
    whole, moved = runs["whole"], runs["moved"]
    assert [line["iteration"] for line in moved.log if "loss/trace" in line] == ["4/6", "5/6", "6/6"]
    for key in ("loss", "loss/trace", "loss/empty", "grad_norm"):
        assert moved.steps(key) == pytest.approx(whole.steps(key)[3:], rel=1e-5), key
    assert moved.steps("alpha")[0] == whole.steps("alpha")[3]  # read from the checkpoint, so to the last bit
    assert moved.steps("alpha") == pytest.approx(whole.steps("alpha")[3:], abs=1e-4)


def test_the_estimators_state_survives(runs):
    estimator = state(runs["whole"], 3)["estimator"]
    assert estimator["probes"] == 3
    assert state(runs["moved"], 6)["estimator"]["probes"] == 6


def test_an_optimizer_that_cannot_be_cut_anew_is_refused(runs):
    error = runs["refused"].error
    assert "UserError" in error and "TP 1 there and 2 here" in error
    assert "--dist_ckpt_optim_fully_reshardable true" in error


def test_an_optimizer_of_other_parts_is_refused(runs):
    error = runs["no-experts"].error
    assert "UserError" in error and "EP 2, TP 1 there and EP 1, TP 1 here" in error
