"""A run learns what the sample rows hold: held-out pairs of both streams, and nothing when labels are shuffled."""

from __future__ import annotations

import json

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, run_beside

STREAMS = ("", "empty/")


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    from megatron_bvpo.rehearsal.sample_data import write_sample_data

    folder = tmp_path_factory.mktemp("learning")
    cells = []
    for name in ("true", "shuffled"):
        write_sample_data(folder / f"{name}-rows", 192, 128, seed=0, shuffle_labels=name == "shuffled")
        flags = (
            f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking "
            f"--dataset {folder / f'{name}-rows' / 'train.jsonl'} "
            f"--val_dataset {folder / f'{name}-rows' / 'heldout.jsonl'} "
            "--tuner_type lora --lora_rank 16 --lora_dropout 0 --lr 1e-3 --lr_decay_style constant "
            "--micro_batch_size 8 --global_batch_size 8 --train_iters 24 --eval_steps 24 --logging_steps 1 "
            "--max_length 512 --bvpo_eval_on_start true"
        )
        cells.append(
            Cell(name, [*flags.split(), *CPU_FLAGS], hook_args={"lora_scale": 0.0, "gradients": False, "save": False})
        )
    return run_beside(folder, *([cell] for cell in cells))


def held_out(result) -> dict:
    return [line for line in result.log if "eval_loss" in line][-1]


@pytest.mark.parametrize("stream", STREAMS)
def test_it_starts_without_a_preference(runs, stream):
    """Policy = reference: every pair is a tie, and a tie counts half."""
    first = next(line for line in runs["true"].log if "eval_loss" in line)
    assert first["iteration"].startswith("0/")
    assert first[f"eval_{stream}rewards/accuracies"] == 0.5
    assert first[f"eval_{stream}rewards/margins"] == 0


@pytest.mark.parametrize("stream", STREAMS)
def test_held_out_pairs_are_told_apart(runs, stream):
    found = held_out(runs["true"])
    assert found[f"eval_{stream}rewards/accuracies"] >= 0.9
    assert found[f"eval_{stream}rewards/margins"] >= 0.25


@pytest.mark.parametrize("stream", STREAMS)
def test_shuffled_labels_teach_nothing(runs, stream):
    # 128 pairs: the standard error of an accuracy of a half is .044
    assert abs(held_out(runs["shuffled"])[f"eval_{stream}rewards/accuracies"] - 0.5) <= 0.13


def test_rows_are_those_of_the_sample(runs, workshop):
    rows = [json.loads(line) for line in workshop.train.read_text().splitlines()]
    assert len(rows) == 16 and all("rejected_response" in row for row in rows)
