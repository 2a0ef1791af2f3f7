"""What ms-swift's loader takes keeps working: CSV, samples, several files, streams, packs, cached data sets;
and an evaluation counts every held-out pair once, whatever the batch."""

from __future__ import annotations

import csv
import json

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, run_beside, run_cells

QUIET = {"lora_scale": 0.02, "gradients": False, "save": False}


def argv(workshop, data: str, more: str = "") -> list[str]:
    run = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking {data} "
        "--tuner_type lora --lora_rank 4 --lora_dropout 0 --lr 1e-3 --micro_batch_size 1 --global_batch_size 4 "
        f"--train_iters 2 --logging_steps 1 --max_length 512 --bvpo_alpha 0.3 {more}"
    )
    return [*run.split(), *CPU_FLAGS]


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    rows = [json.loads(line) for line in workshop.train.read_text().splitlines()]
    table = folder / "rows.csv"
    with table.open("w", newline="") as file:
        columns = ["messages", "rejected_response", "empty_response", "empty_rejected_response"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(row[k]) if k == "messages" else row.get(k, "") for k in columns})
    asked, answer = rows[0]["messages"]
    long = {**rows[0], "messages": [{**asked, "content": asked["content"] + " Hm." * 600}, answer]}
    mixed = folder / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], long, long, *rows[1:], long]))
    half = folder / "half.jsonl"
    half.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))

    held_out = f"--dataset {workshop.train} --val_dataset {workshop.held_out} --eval_steps 2"
    cells = {
        "jsonl": argv(workshop, f"--dataset {workshop.train} --dataset_shuffle false --train_dataloader_shuffle false"),
        "csv": argv(workshop, f"--dataset {table} --dataset_shuffle false --train_dataloader_shuffle false"),
        "sample": argv(workshop, f"--dataset {workshop.train}#8"),
        "two-files": argv(workshop, f"--dataset {half} {workshop.train}"),
        "stream": argv(workshop, f"--dataset {workshop.train} --dataset_shuffle false", "--streaming true"),
        "stream-mixed": argv(
            workshop, f"--dataset {mixed} --dataset_shuffle false", "--streaming true --train_iters 4"
        ),
        "lazy-mixed": argv(
            workshop,
            f"--dataset {mixed} --dataset_shuffle false --train_dataloader_shuffle false",
            "--lazy_tokenize true --train_iters 4",
        ),
        "eval-4": argv(workshop, held_out),
        "eval-1": argv(workshop, held_out, "--global_batch_size 1 --train_iters 8 --eval_steps 8"),
        "eval-wide": argv(
            workshop, held_out, "--micro_batch_size 2 --global_batch_size 8 --train_iters 1 --eval_steps 1"
        ),
    }
    one = [Cell(n, a, hook_args=QUIET) for n, a in cells.items()]
    found = run_beside(folder, one[::2], one[1::2])
    two = Cell("eval-dp2", argv(workshop, held_out), hook_args=QUIET)
    found.update(run_cells(2, [two], folder))
    return found


@pytest.mark.parametrize("name", ["csv", "stream"])
def test_the_same_rows_from_another_source(runs, name):
    for key in ("loss", "logps/chosen", "empty/logps/rejected", "grad_norm"):
        assert runs[name].steps(key)[0] == pytest.approx(runs["jsonl"].steps(key)[0], rel=1e-6), key


@pytest.mark.parametrize("name", ["sample", "two-files"])
def test_trains(runs, name):
    assert len(runs[name].steps("loss/empty")) == 2


def test_rows_that_prove_too_long_while_training_are_counted(runs):
    """Three of 19 rows, in 4 steps of 4 that take all of a stream."""
    stream, lazy = runs["stream-mixed"], runs["lazy-mixed"]
    assert [stream.steps("rows/read")[i] for i in (0, 3)] == [6, 19]
    assert [stream.steps("rows/unused")[i] for i in (0, 3)] == [2, 3]
    assert len(lazy.steps("loss")) == 4 and lazy.steps("rows/unused")[-1] >= 2, "of the first 16 rows"
    assert lazy.steps("rows/read")[-1] == 16 + lazy.steps("rows/unused")[-1]


def evaluation(result) -> dict:
    return [line for line in result.log if "eval_loss" in line][-1]


def test_every_held_out_pair_counts_once(runs):
    """Five pairs, in global batches of 4 and 8 and over two ranks; an accuracy is a multiple of a fifth."""
    base = evaluation(runs["eval-4"])
    for stream in ("", "empty/"):
        fifths = base[f"eval_{stream}rewards/accuracies"] * 5
        assert fifths == pytest.approx(round(fifths), abs=1e-5)
    two = evaluation(runs["eval-dp2"])
    for key, value in base.items():
        if key.startswith("eval_") and isinstance(value, float):
            assert two[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_eval_loss_mixes_the_streams_at_the_given_alpha(runs):
    for name in ("eval-1", "eval-4", "eval-wide"):
        found = evaluation(runs[name])
        assert found["eval_loss"] == pytest.approx(0.3 * found["eval_loss/trace"] + 0.7 * found["eval_loss/empty"])
