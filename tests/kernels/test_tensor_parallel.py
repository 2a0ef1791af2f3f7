"""Vocabulary-parallel and sequence-parallel log-probs on gloo ranks, against one rank.

N = 24 tokens, H = 33 hidden, vocabulary 237 in shards that are even, uneven, or end in padding.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_bvpo.kernels import target_logps
from tests.distributed.ranks import RankError, run_ranks

from .cases import random_case, relative, run

VOCAB = 237
SHARDS = {
    1: [[VOCAB]],
    2: [[120, 120], [100, 137], [VOCAB + 3, 5]],  # the last one: a rank with nothing but padding
    4: [[60] * 4, [70, 50, 1, 116], [80] * 4],
}


def example(dtype, ranks):
    case = random_case(24, 33, VOCAB, dtype, spread=3.0, ignored=0.3, device="cpu")
    case.hidden_NH[5] *= 60  # one token in the overflow fallback
    case.targets_N[5] = 3
    case.targets_N[20:] = -100  # with 4 ranks the last chunk ends in ignored tokens only
    return case


def compare(rank, world_size, shards, dtype_name):
    """Largest relative differences (logps, d hidden, d weight) from one rank, over frozen, trainable and SP."""
    case = example(getattr(torch, dtype_name), world_size)
    padding = torch.full((sum(shards) - VOCAB, 33), 9.0, dtype=case.weight_VH.dtype)
    whole = torch.cat([case.weight_VH, padding])
    start = sum(shards[:rank])
    worst, everyones_logps = [0.0, 0.0, 0.0], []
    for frozen in (True, False):
        logps_1, hidden_1, weight_1 = run(case, frozen=frozen)
        for sp in (False, True):
            hidden = case.hidden_NH.chunk(world_size)[rank] if sp else case.hidden_NH
            hidden = hidden.clone().requires_grad_()
            weight = whole[start : start + shards[rank]].clone().requires_grad_(not frozen)
            logps = target_logps(
                hidden,
                weight,
                case.targets_N,
                tp_group=dist.group.WORLD,
                sequence_parallel=sp,
                vocab_size=VOCAB,
                block_tokens=5 + rank,  # ranks need not agree on their tiles
                tile_vocab=30 + 7 * rank,
            )
            logps.backward(case.upstream_N)
            everyones_logps.append(logps.detach())
            true_hidden = hidden_1.chunk(world_size)[rank] if sp else hidden_1
            pairs = [(logps.detach(), logps_1), (hidden.grad, true_hidden)]
            if not frozen:
                true_weight = torch.cat([weight_1, torch.zeros_like(padding)])[start : start + shards[rank]]
                pairs.append((weight.grad, true_weight))
            for i, (value, truth) in enumerate(pairs):
                worst[i] = max(worst[i], relative(value, truth.double()))
    return worst, torch.stack(everyones_logps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_equal_one(ranks, dtype):
    for shards in SHARDS[ranks]:
        results = run_ranks(ranks, compare, shards, dtype)
        bound = 1e-6 if dtype == "float32" else 4e-3
        for worst, logps in results:
            assert max(worst) <= bound, (shards, worst)
            assert torch.equal(logps, results[0][1])  # bit for bit the same on every rank


def vendor(rank, world_size):
    """impl="te" with Megatron's kind of vocabulary-parallel cross-entropy, written with autograd."""
    from torch.distributed.nn.functional import all_reduce

    case = random_case(24, 33, 240, ignored=0.3, device="cpu")
    start = rank * 240 // world_size

    def cross_entropy(logits_NV, targets_N):
        total = all_reduce(logits_NV.exp().sum(1))
        local = targets_N - start
        own = (local >= 0) & (local < logits_NV.shape[1])
        picked = logits_NV.gather(1, local.clamp(0, logits_NV.shape[1] - 1)[:, None]).squeeze(1) * own
        return total.log() - all_reduce(picked)

    _, true_hidden, _ = run(case)
    worst = 0.0
    for sp in (False, True):
        hidden = case.hidden_NH.chunk(world_size)[rank] if sp else case.hidden_NH
        hidden = hidden.clone().requires_grad_()
        weight = case.weight_VH.chunk(world_size)[rank]
        logps = target_logps(
            hidden, weight, case.targets_N, tp_group=dist.group.WORLD, sequence_parallel=sp,
            impl="te", cross_entropy=cross_entropy,
        )  # fmt: skip
        # Unlike Megatron's, this all_reduce adds the ranks' (equal) upstream gradients in its backward.
        logps.backward(case.upstream_N / world_size)
        truth = true_hidden.chunk(world_size)[rank] if sp else true_hidden
        worst = max(worst, relative(hidden.grad, truth.double()))
    return worst


def test_vendor_path_reduces_as_ours_does():
    assert max(run_ranks(2, vendor)) <= 1e-6


def different_counts(rank, world_size):
    n = 4 + rank
    target_logps(torch.zeros(n, 3), torch.zeros(5, 3), torch.zeros(n).long(), tp_group=dist.group.WORLD)


def test_ranks_with_different_tokens_raise_and_do_not_hang():
    with pytest.raises(RankError, match=r"different numbers of targets: \[4, 5\]"):
        run_ranks(2, different_counts, timeout_s=60)
