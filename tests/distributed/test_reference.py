"""The reference stays the reference: its log-probs of a row are the same at every step of a run.

Two epochs with a high learning rate and LoRA dropout on, so that anything of the policy that leaks into
the reference shows: the router's adapter, a merge that does not give the base weights back, dropout. Each row is
its own micro-batch, so that its log-probs must be equal to the last bit.
"""

from __future__ import annotations

import json

import pytest
import torch

from megatron_bvpo.launching.adapter_folders import CONFIG, PER_EXPERT
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

HOOK = "tests.distributed.recorders:record_reference"


def flags(workshop, more: str) -> list[str]:
    run = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        "--lr 5e-2 --lr_decay_style constant --micro_batch_size 1 --global_batch_size 8 --train_iters 4 "
        "--logging_steps 1 --max_length 512"
    )
    return [*run.split(), *CPU_FLAGS, *more.split()]


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    adapter = "--tuner_type lora --lora_rank 4 --lora_dropout 0.1"
    router = f"{adapter} --use_rslora true --target_modules all-linear all-router"
    cells = [
        Cell("router", flags(workshop, router), hook=HOOK, hook_args={"save": False}),
        Cell("merged", flags(workshop, f"{router} --save_steps 1 --merge_lora true"), hook=HOOK),
        Cell("full", flags(workshop, "--tuner_type full --lr 1e-3"), hook=HOOK, hook_args={"save": False}),
    ]
    folder = tmp_path_factory.mktemp("reference")
    found = run_cells(1, cells, folder)
    again = f"{router} --ref_adapters {found['merged'].folder / 'checkpoint-4'}"
    found.update(run_cells(1, [Cell("adapter", flags(workshop, again), hook=HOOK, hook_args={"save": False})], folder))
    return found


@pytest.mark.parametrize("name", ["router", "merged", "full", "adapter"])
def test_reference_logps_of_a_row_never_change(runs, name):
    seen = runs[name].recorded["reference"]
    assert len(seen) == 32  # 16 rows, two streams
    for row, values in seen.items():
        assert len(values) == 2, row
        assert torch.equal(values[0], values[1]), (row, values)


@pytest.mark.parametrize("name", ["router", "merged", "full", "adapter"])
def test_policy_logps_do_change(runs, name):
    """Or the test above would hold for a run that trains nothing."""
    seen = runs[name].recorded["policy"]
    assert all(abs(values[0] - values[1]).max() > 1e-2 for values in seen.values())


def test_a_reference_adapter_is_used(runs):
    """Its log-probs are those of the adapter it was loaded from, not of the bare model."""
    bare, adapted = runs["router"].recorded["reference"], runs["adapter"].recorded["reference"]
    assert all(abs(bare[row][0] - adapted[row][0]).max() > 1e-2 for row in bare)


def test_what_is_saved_is_what_was_trained(runs):
    """peft hands mcore-bridge's layers their settings in two ways, and one of them was not read."""
    saved = runs["merged"].folder / "checkpoint-4" / PER_EXPERT / CONFIG  # peft's own form has no dropout
    config = json.loads(saved.read_text())
    assert config["lora_dropout"] == 0.1 and config["use_rslora"] and config["r"] == 4
    assert runs["merged"].recorded["dropouts"] == {0.1}
    assert runs["merged"].recorded["scalings"] == {config["lora_alpha"] / 2}
