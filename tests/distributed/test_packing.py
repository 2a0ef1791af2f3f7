"""Packing changes nothing: the same pairs in any micro-batches give the same loss and the same gradient.

Of the eight rows two have no empty pair and one no trace pair: N_t and N_e differ, and no pack holds the streams alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from megatron_bvpo.objective.preference import PreferenceConfig, pair_losses
from tests.distributed.hf_oracle import STREAMS
from tests.distributed.oracle_recorder import pair_logps
from tests.distributed.oracle_runs import ALPHA, PACKED_ROWS, WITHOUT_EMPTY, WITHOUT_TRACE

TOLERANCE = 1e-5
# name: pairs of the trace stream in each micro-batch that has one
MICRO_BATCHES = {
    "one": [1] * 7,
    "two": [1, 2, 2, 2],
    "two-padded": [1, 2, 2, 2],
    "packs": [2, 2, 3],  # and one of an empty pair alone
    "longer-packs": [1, 3, 3],
}


def pairs_of(run, stream: str) -> list[dict]:
    return [pair for pair in run.recorded["pairs"] if pair["stream"] == stream]


@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_the_same_pairs_are_batched_differently(packings, name):
    trace, empty = (pairs_of(packings[name], stream) for stream in STREAMS)
    assert sorted(pair["row"] for pair in trace) == [i for i in range(PACKED_ROWS) if i not in WITHOUT_TRACE]
    assert sorted(pair["row"] for pair in empty) == [i for i in range(PACKED_ROWS) if i not in WITHOUT_EMPTY]
    assert sorted(Counter(pair["micro_batch"] for pair in trace).values()) == MICRO_BATCHES[name]


@pytest.mark.parametrize("name", [name for name in MICRO_BATCHES if name != "one"])
def test_loss_and_gradient_are_the_same(packings, name):
    one, other = packings["one"], packings[name]
    logged = [key for key in one.log[0] if key.startswith(("loss", "empty/", "logps", "rewards", "grad_norm"))]
    assert {"loss", "loss/trace", "loss/empty", "grad_norm"} < set(logged)
    for key in logged:
        floor = TOLERANCE if "rewards" in key else 0.0
        assert other.log[0][key] == pytest.approx(one.log[0][key], rel=TOLERANCE, abs=floor), key
    (expected,), (found,) = one.recorded["gradients"], other.recorded["gradients"]
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= TOLERANCE * gradient.norm(), key


@pytest.mark.parametrize("name", ["packs", "longer-packs"])
def test_a_mean_of_micro_batch_means_would_differ(packings, name):
    """What ms-swift's own Megatron DPO does: a pair's weight then depends on the company it is packed with."""
    run = packings[name]
    by_pair, by_pack = 0.0, 0.0
    for stream, weight in zip(STREAMS, (ALPHA, 1 - ALPHA), strict=True):
        losses, packs = [], defaultdict(list)
        for pair in pairs_of(run, stream):
            loss = pair_losses(pair_logps(pair), PreferenceConfig()).loss.item()
            losses.append(loss)
            packs[pair["micro_batch"]].append(loss)
        by_pair += weight * sum(losses) / len(losses)
        by_pack += weight * torch.tensor([sum(p) / len(p) for p in packs.values()]).mean().item()
    assert run.log[0]["loss"] == pytest.approx(by_pair, rel=TOLERANCE)
    assert abs(by_pack - by_pair) > 1e-3 * by_pair
