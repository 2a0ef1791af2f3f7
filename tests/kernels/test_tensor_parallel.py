"""Vocabulary-parallel and sequence-parallel log-probs on gloo ranks, which lose no precision to one rank.

N = 24 tokens, H = 33 hidden (40 for the fused path, whose rows are aligned), vocabulary 237 in shards that are even,
uneven, or end in padding.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_bvpo.kernels import target_logps
from tests.distributed.ranks import RankError, run_ranks

from .cases import random_case, run
from .error_bounds import allowed, in_units

VOCAB = 237
SHARDS = {
    1: [[VOCAB]],
    2: [[120, 120], [100, 137], [VOCAB + 3, 5]],  # the last one: a rank with nothing but padding
    4: [[60] * 4, [70, 50, 1, 116], [80] * 4],
}


HIDDEN = {"torch": 33, "fused": 40}


def example(dtype, impl="torch"):
    case = random_case(24, HIDDEN[impl], VOCAB, dtype, spread=3.0, ignored=0.3, device="cpu")
    case.hidden_NH[5] *= 60  # one token in the overflow fallback
    case.targets_N[5] = 3
    case.targets_N[20:] = -100  # with 4 ranks the last chunk ends in ignored tokens only
    return case


def on_ranks(rank, world_size, shards, dtype_name, impl):
    """This rank's (logps, d hidden, d weight or None) by (frozen, sequence parallel)."""
    case = example(getattr(torch, dtype_name), impl)
    padding = torch.full((sum(shards) - VOCAB, HIDDEN[impl]), 9.0, dtype=case.weight_VH.dtype)
    whole = torch.cat([case.weight_VH, padding])
    start = sum(shards[:rank])
    results = {}
    for frozen in (True, False):
        for sp in (False, True):
            hidden = case.hidden_NH.chunk(world_size)[rank] if sp else case.hidden_NH
            hidden = hidden.clone().requires_grad_()
            weight = whole[start : start + shards[rank]].clone().requires_grad_(not frozen)
            logps, entropies = target_logps(
                hidden,
                weight,
                case.targets_N,
                tp_group=dist.group.WORLD,
                sequence_parallel=sp,
                vocab_size=VOCAB,
                impl=impl,
                return_entropy=True,
                block_tokens=5 + rank,  # ranks need not agree on their tiles
                tile_vocab=30 + 7 * rank,
            )
            logps.backward(case.upstream_N)
            results[frozen, sp] = logps.detach(), hidden.grad, weight.grad, entropies
    return results


def true_entropies(case) -> torch.Tensor:
    """In float64, 0 for ignored tokens."""
    logps_NV = torch.log_softmax(case.hidden_NH.double() @ case.weight_VH.double().T, dim=1)
    return -(logps_NV.exp() * logps_NV).sum(1) * (case.targets_N != -100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["torch", "fused"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_are_as_good_as_one(ranks, impl, dtype):
    """As near to float64 as one rank is, whatever the order of its sums: error_bounds.py."""
    case = example(getattr(torch, dtype), impl)
    bounds = {frozen: allowed(case, partial(run, frozen=frozen)) for frozen in (True, False)}
    for shards in SHARDS[ranks]:
        everyone = run_ranks(ranks, on_ranks, shards, dtype, impl)
        for frozen, sp in everyone[0]:
            logps, grad_hidden, grad_weight, entropies = zip(
                *(results[frozen, sp] for results in everyone), strict=True
            )
            for other in logps:
                assert torch.equal(other, logps[0])  # bit for bit the same on every rank
            for entropies_N in entropies:
                assert torch.equal(entropies_N, entropies[0])
                assert (entropies_N - true_entropies(case)).abs().max() <= 1e-5 * 8  # of at most log 237
            weight = None
            if not frozen:
                weight, padding = torch.cat(grad_weight).split([VOCAB, sum(shards) - VOCAB])
                assert not padding.any()
            for whole in [torch.cat(grad_hidden)] if sp else grad_hidden:
                errors = in_units(case, (logps[0], whole, weight))
                assert all(e <= b for e, b in zip(errors, bounds[frozen], strict=True)), (shards, frozen, sp, errors)


def different_counts(rank, world_size):
    n = 4 + rank
    target_logps(torch.zeros(n, 3), torch.zeros(5, 3), torch.zeros(n).long(), tp_group=dist.group.WORLD)


def test_ranks_with_different_tokens_raise_and_do_not_hang():
    with pytest.raises(RankError, match=r"different numbers of targets: \[4, 5\]"):
        run_ranks(2, different_counts, timeout_s=60)
