"""Rows with all four streams, unevenly, runs on them, and how test_streams.py and test_unpaired.py compare them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.cells import CPU_FLAGS, Cell
from tests.distributed.hf_oracle import Oracle, read_rows, shared_name
from tests.distributed.oracle_runs import dense, moe, other_dense

TOLERANCE = 1e-5
ALL = "--bvpo_streams trace empty short expert"
WEIGHTS = "--bvpo_weights trace=.5 empty=.2 short=.3"
MU = "--bvpo_expert_loss sft_phi --bvpo_mu_peak .4 --bvpo_mu_valley .1 --bvpo_mu_decay_steps 4"
# The share of demonstrations in the first three steps, by CHORD's formula.
SHARES = (0.4, 0.1 + 0.3 * 0.5 * (1 + 2**-0.5), 0.25)
LORA, FULL = "--tuner_type lora --lora_rank 4 --lora_dropout 0", "--tuner_type full"
# Rows that lack a stream; row 11 is a demonstration alone.
WITHOUT = {"empty": (1, 6, 8), "short": (2, 3, 8, 9), "expert": (0, 4, 5, 9)}
EXPERT_ALONE = 11


def stream_rows(workshop) -> list[dict]:
    """The workshop's rows with shortened traces and demonstrations; not every row has every stream."""
    rows = read_rows(workshop.train)
    for i, row in enumerate(rows):
        chosen, rejected = row["messages"][1]["content"], row["rejected_response"]
        if i not in WITHOUT["short"]:
            row |= {"short_response": shortened(chosen), "short_rejected_response": shortened(rejected)}
        if i not in WITHOUT["expert"]:
            row["expert_response"] = chosen.replace("<think>\n", f"<think>\nDemonstration {i}. ")
        if i in WITHOUT["empty"]:
            row |= {"empty_response": "The same.", "empty_rejected_response": "The same."}
    alone = rows[EXPERT_ALONE]
    rows[EXPERT_ALONE] = {"messages": alone["messages"][:1], "expert_response": alone["messages"][1]["content"]}
    return rows


def shortened(response: str) -> str:
    """The last sentence of the trace, and the answer."""
    trace, answer = response.removeprefix("<think>\n").split("</think>")
    return f"<think>\n{trace.strip().splitlines()[-1][-40:]}\n</think>{answer}"


def write(workshop, name: str, rows: list[dict]) -> Path:
    file = workshop.folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def cell(name: str, flags: str, **more) -> Cell:
    run = "--lr 1e-3 --adam_eps 1e-4 --micro_batch_size 1 --logging_steps 1 --max_length 512 --dataset_shuffle false "
    return Cell(name, [*f"{run} {flags}".split(), *CPU_FLAGS], **more)


def parity_flags(workshop) -> str:
    data = f"--dataset {write(workshop, 'streams', stream_rows(workshop))} --global_batch_size 8 --train_iters 3"
    return f"{moe(workshop)} {data} {ALL} {MU}"


def single_flags(workshop) -> str:
    """One step of full tuning on the dense model."""
    return f"{dense(workshop)} --dataset {write(workshop, 'streams', stream_rows(workshop))} {FULL} --train_iters 1"


def other_reference(workshop) -> str:
    return f"--ref_model {other_dense(workshop)}"


def count(stream: str) -> int:
    """Rows that have the stream: the global batch that holds each of them once."""
    return 16 - len(WITHOUT[stream]) - (stream != "expert")


def close(found: dict, base: dict, tolerance: float) -> None:
    """Every tensor; what is small beside the whole is rounding."""
    assert found.keys() == base.keys() and base
    norm = torch.stack([g.norm() for g in base.values()]).norm()
    for name, gradient in base.items():
        assert (found[name] - gradient).norm() <= tolerance * max(gradient.norm(), 1e-2 * norm), name


def against(run, oracle: Oracle, loss) -> None:
    """A run's first step is what the oracle says of this loss."""
    assert run.log[0]["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    expected = oracle.gradients(loss)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert run.log[0]["grad_norm"] == pytest.approx(norm.item(), rel=TOLERANCE)
    (found,) = run.recorded["gradients"]
    for name, gradient in found.items():
        wanted = expected[shared_name(name)]
        assert (gradient - wanted).norm() <= TOLERANCE * max(wanted.norm(), 1e-4 * norm), name
