"""The first step of real runs against Hugging Face in float64: tokens, log-probs, losses, gradients.

Three runs: LoRA on the MoE (with the router, rsLoRA), LoRA on the dense model, and full tuning of the dense
model against a reference of its own, where two rows have no empty pair and one is an empty pair alone.
`hf_oracle.py` is the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.distributed import oracle_runs
from tests.distributed.cells import CellResult
from tests.distributed.hf_oracle import STREAMS, Oracle, dpo_loss, pair_of, read_rows, shared_name, tokens
from tests.distributed.oracle_runs import ALPHA

TOLERANCE = 1e-5


@dataclass
class Compared:
    """A run, and what the oracle makes of its rows: (stream, row) to its four log-probs."""

    run: CellResult
    rows: list[dict]
    oracle: Oracle
    logps: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor, Tensor]]

    @property
    def pairs(self) -> list[dict]:
        return self.run.recorded["pairs"]

    def mean_loss(self, stream: str) -> Tensor:
        return torch.stack([dpo_loss(logps) for (s, _), logps in self.logps.items() if s == stream]).mean()


@pytest.fixture(scope="module", params=["moe", "dense", "full"])
def compared(request, workshop) -> Compared:
    if request.param == "full":
        run, file = request.getfixturevalue("packings")["one"], workshop.folder / "packing.jsonl"
        oracle = Oracle(workshop.dense, reference=oracle_runs.other_dense(workshop))
    else:
        run, file = request.getfixturevalue("saved_runs")[request.param], workshop.train
        scale = {"moe": oracle_runs.RSLORA_SCALE, "dense": oracle_runs.LORA_SCALE}[request.param]
        oracle = Oracle(getattr(workshop, request.param), run.recorded["adapter"], scale)
    rows = read_rows(file)
    keys = [(pair["stream"], pair["row"]) for pair in run.recorded["pairs"]]
    logps = {(stream, row): oracle.pair_logps(pair_of(rows[row], stream)) for stream, row in keys}
    return Compared(run, rows, oracle, logps)


def test_the_step_holds_what_it_should(compared):
    """Or the tests below would compare nothing."""
    of = {stream: sorted(row for s, row in compared.logps if s == stream) for stream in STREAMS}
    if compared.oracle.reference is not compared.oracle.model:
        rows = range(oracle_runs.PACKED_ROWS)
        assert of["trace"] == [row for row in rows if row not in oracle_runs.WITHOUT_TRACE]
        assert of["empty"] == [row for row in rows if row not in oracle_runs.WITHOUT_EMPTY]
    else:
        assert len(of["trace"]) == 4 and of["trace"] == of["empty"]
        own = {"empty_response" in compared.rows[row] for row in of["empty"]}
        assert own == {True, False}  # rows with their own empty answers, and rows stripped of their traces


def test_tokens_and_what_is_scored(compared):
    for (stream, row), ours in compared.run.recorded["sequences"].items():
        theirs = tokens(compared.oracle.tokenizer, pair_of(compared.rows[row], stream))
        for (ids, labels), (expected, given) in zip(ours, theirs, strict=True):
            assert ids.tolist() == expected.tolist(), (stream, row)
            assert labels.tolist() == [-100] * given + expected[given:].tolist(), (stream, row)


def test_logps_of_policy_and_reference(compared):
    for pair in compared.pairs:
        found = torch.tensor([*pair["logps"], *pair["ref_logps"]], dtype=torch.float64)
        expected = torch.stack(compared.logps[pair["stream"], pair["row"]]).detach()
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=0, msg=lambda m, p=pair: f"{p}: {m}")


def test_policy_and_reference_differ(compared):
    """A loss of ln 2 would hide most faults."""
    assert all(abs(p["logps"][i] - p["ref_logps"][i]) > 1e-3 for p in compared.pairs for i in (0, 1))


def test_losses(compared):
    line = compared.run.log[0]
    trace, empty = (compared.mean_loss(stream).item() for stream in STREAMS)
    assert line["loss/trace"] == pytest.approx(trace, rel=TOLERANCE)
    assert line["loss/empty"] == pytest.approx(empty, rel=TOLERANCE)
    assert line["loss"] == pytest.approx(ALPHA * trace + (1 - ALPHA) * empty, rel=TOLERANCE)


@pytest.mark.parametrize("stream", STREAMS)
def test_logged_metrics_are_means_over_pairs(compared, stream):
    logps = torch.stack([torch.stack(v) for (s, _), v in compared.logps.items() if s == stream]).detach()
    rewards = 0.1 * (logps[:, :2] - logps[:, 2:])
    expected = {
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).double().mean(),
    }
    line, prefix = compared.run.log[0], "empty/" if stream == "empty" else ""
    for name, value in expected.items():
        # Rewards are small differences of large numbers that the model computes in float32.
        floor = TOLERANCE if name.startswith("rewards") else 0.0
        assert line[prefix + name] == pytest.approx(value.item(), rel=TOLERANCE, abs=floor), name


def test_gradients_of_the_mixed_loss(compared):
    """Every tensor for itself, and the norm. Where Megatron has one A for several layers, it is their sum."""
    loss = ALPHA * compared.mean_loss("trace") + (1 - ALPHA) * compared.mean_loss("empty")
    expected = compared.oracle.gradients(loss)
    (found,) = compared.run.recorded["gradients"]
    assert {shared_name(name) for name in found} == set(expected)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in found.items():
        wanted = expected[shared_name(name)]
        # Experts that saw no token have none, and what is small beside the whole is rounding.
        assert (gradient - wanted).norm() <= TOLERANCE * max(wanted.norm(), 1e-4 * norm), name
    assert compared.run.log[0]["grad_norm"] == pytest.approx(norm.item(), rel=TOLERANCE)
