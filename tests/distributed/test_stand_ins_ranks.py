"""The stand-ins over several ranks against one rank: outputs and all gradients, in float64."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_bvpo.rehearsal import install
from tests.distributed.ranks import RankError, run_ranks

install(device=False, transformer_engine=True)

F64 = torch.float64


def stand_ins():
    install(device=False, transformer_engine=True)


# ---------------------------------------------------------------------------------------------- the helper


def sum_of_ranks(rank, world_size, start):
    total = torch.tensor([start + rank])
    dist.all_reduce(total)
    return {"total": total, "rank": (rank, world_size), "threads": torch.get_num_threads()}


def fail_on_rank_one(rank, world_size):
    if rank == 1:
        raise ValueError("no luck on this rank")
    dist.barrier()


def hang(rank, world_size):
    if rank == 0:
        time.sleep(1000)


def die(rank, world_size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def test_run_ranks_returns_results_in_rank_order():
    results = run_ranks(2, sum_of_ranks, 10)
    assert [result["total"].item() for result in results] == [21, 21]
    assert [result["rank"] for result in results] == [(0, 2), (1, 2)]
    assert [result["threads"] for result in results] == [1, 1]


def test_run_ranks_passes_on_what_went_wrong():
    with pytest.raises(RankError, match="rank 1 of 2 raised(?s:.*)no luck on this rank"):
        run_ranks(2, fail_on_rank_one)
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code 7"):
        run_ranks(2, die)
    with pytest.raises(TimeoutError, match=r"of 2 had not answered after 20 s"):
        run_ranks(2, hang, timeout_s=20)


# --------------------------------------------------------------------------------------------------- linear


def values(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def part(tensor, rank, ranks, dim):
    return tensor.chunk(ranks, dim)[rank].clone()


def whole_problem():
    """x [6, 2, 8] -> norm -> W1 [12, 8] -> tanh -> W2 [8, 12] -> y, with the gradient of y: on one rank."""
    import transformer_engine.pytorch as te

    norm_first = te.LayerNormLinear(8, 12, normalization="RMSNorm", return_layernorm_output=True, params_dtype=F64)
    second = te.Linear(12, 8, params_dtype=F64)
    with torch.no_grad():
        for i, param in enumerate([*norm_first.parameters(), *second.parameters()]):
            param.copy_(values(*param.shape, seed=i))
    x = values(6, 2, 8, seed=100).requires_grad_()
    hidden, normed = norm_first(x)
    y = second(hidden.tanh()) + normed
    y.backward(values(6, 2, 8, seed=101))
    return norm_first, second, x, y


def column_then_row(rank, world_size, sequence_parallel, gathered):
    """The same over tensor-parallel ranks; compared here, so that the ranks return only their verdict."""
    import transformer_engine.pytorch as te

    group = dist.group.WORLD
    options = {
        "params_dtype": F64,
        "tp_group": group,
        "tp_size": world_size,
        "sequence_parallel": sequence_parallel,
    }
    one_first, one_second, one_x, one_y = whole_problem()
    first = te.LayerNormLinear(
        8,
        12,
        normalization="RMSNorm",
        return_layernorm_output=True,
        return_layernorm_output_gathered=gathered,
        parallel_mode="column",
        **options,
    )
    second = te.Linear(12, 8, parallel_mode="row", **options)
    with torch.no_grad():
        first.layer_norm_weight.copy_(one_first.layer_norm_weight)
        first.weight.copy_(part(one_first.weight, rank, world_size, 0))
        first.bias.copy_(part(one_first.bias, rank, world_size, 0))
        second.weight.copy_(part(one_second.weight, rank, world_size, 1))
        second.bias.copy_(one_second.bias)
    shard = (lambda t: part(t, rank, world_size, 0)) if sequence_parallel else (lambda t: t.clone())
    x = shard(one_x.detach()).requires_grad_()
    hidden, normed = first(x)
    if gathered and sequence_parallel:
        assert normed.shape[0] == 6
        # One copy of each row counts; the gather's backward sums over the ranks.
        own = torch.zeros(6, 1, 1, dtype=F64)
        own[rank * 6 // world_size : (rank + 1) * 6 // world_size] = 1
        y = second(hidden.tanh())
        normed_part = (normed * own * values(6, 2, 8, seed=101)).sum()
        (y * shard(values(6, 2, 8, seed=101))).sum().add(normed_part).backward()
        y = y + shard(normed)
    else:
        y = second(hidden.tanh()) + normed
        y.backward(shard(values(6, 2, 8, seed=101)))

    def summed(grad):  # what Megatron's finalisation does for parameters marked sequence_parallel
        grad = grad.clone()
        if sequence_parallel:
            dist.all_reduce(grad)
        return grad

    assert first.layer_norm_weight.sequence_parallel == second.bias.sequence_parallel == sequence_parallel
    pairs = {
        "y": (y, shard(one_y)),
        "x": (x.grad, shard(one_x.grad)),
        "first weight": (first.weight.grad, part(one_first.weight.grad, rank, world_size, 0)),
        "first bias": (first.bias.grad, part(one_first.bias.grad, rank, world_size, 0)),
        "second weight": (second.weight.grad, part(one_second.weight.grad, rank, world_size, 1)),
        "second bias": (summed(second.bias.grad), one_second.bias.grad),
        "norm": (summed(first.layer_norm_weight.grad), one_first.layer_norm_weight.grad),
    }
    for name, (got, expected) in pairs.items():
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def linear_layouts(rank, world_size):
    import transformer_engine.pytorch as te

    for sequence_parallel, gathered in ((False, False), (True, False), (True, True)):
        column_then_row(rank, world_size, sequence_parallel, gathered)
    layer = te.Linear(2 * world_size, 4, parallel_mode="row", tp_group=dist.group.WORLD, sequence_parallel=True)
    with pytest.raises(ValueError, match=f"cannot reduce-scatter 7 rows over {world_size} ranks"):
        layer(torch.zeros(7, 1, 2))


@pytest.mark.parametrize("world_size", [2, 3])
def test_column_and_row_linear_equal_one_rank(world_size):
    run_ranks(world_size, linear_layouts, before=stand_ins)


# ------------------------------------------------------------------------------------------------ attention


def held(lengths, rank, ranks):
    """Rows of a pack that a context-parallel rank holds, written out plainly."""
    rows, start = [], 0
    for length in lengths:
        chunks = list(torch.arange(start, start + length).chunk(2 * ranks))
        rows += [chunks[rank], chunks[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(rows)


def attention_over_context(rank, world_size, layout, mask_type, window):
    import transformer_engine.pytorch as te

    blocks, true = ([24], [24]) if layout == "sbhd" else ([12, 24, 12], [9, 24, 5])
    rows = sum(blocks)
    shapes = [(rows, 2, 4, 8), (rows, 2, 2, 8), (rows, 2, 2, 8)]
    if layout == "thd":
        shapes = [(shape[0], *shape[2:]) for shape in shapes]
    whole = [values(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    options = {"attn_mask_type": mask_type, "window_size": window, "qkv_format": layout}
    call = {}
    if layout == "thd":
        bounds = torch.tensor([0, *torch.tensor(true).cumsum(0)], dtype=torch.int32)
        padded = torch.tensor([0, *torch.tensor(blocks).cumsum(0)], dtype=torch.int32)
        call = {
            "cu_seqlens_q": bounds,
            "cu_seqlens_kv": bounds,
            "cu_seqlens_q_padded": padded,
            "cu_seqlens_kv_padded": padded,
        }
    expected = te.DotProductAttention(4, 8, 2, **options)(*whole, **call)
    upstream = values(*expected.shape, seed=9)
    expected.backward(upstream)

    mine = held(blocks, rank, world_size)
    own = [x.detach()[mine].requires_grad_() for x in whole]
    attention = te.DotProductAttention(4, 8, 2, cp_group=dist.group.WORLD, cp_comm_type="p2p", **options)
    out = attention(*own, **call)
    out.backward(upstream[mine])
    torch.testing.assert_close(out, expected[mine], rtol=1e-11, atol=1e-11)
    for got, full in zip(own, whole, strict=True):
        torch.testing.assert_close(got.grad, full.grad[mine], rtol=1e-11, atol=1e-11)


def attention_with_a_tail():
    """Rows behind the last sequence are padding of the pack: zeros out, zero gradients."""
    import transformer_engine.pytorch as te

    q, k, v = (values(10, heads, 8, seed=heads + i).requires_grad_() for i, heads in enumerate((4, 2, 2)))
    bounds = torch.tensor([0, 8, 16], dtype=torch.int32)
    attention = te.DotProductAttention(4, 8, 2, cp_group=dist.group.WORLD)
    out = attention(q, k, v, qkv_format="thd", cu_seqlens_q=bounds, attn_mask_type="padding_causal")
    out.sum().backward()
    assert out.shape == (10, 32)
    for rows in (out, q.grad, k.grad, v.grad):
        assert rows[8:].abs().sum() == 0 < rows[:8].abs().sum()


def attention_layouts(rank, world_size):
    import transformer_engine.pytorch as te

    attention_over_context(rank, world_size, "sbhd", "causal", None)
    attention_over_context(rank, world_size, "sbhd", "no_mask", None)
    attention_over_context(rank, world_size, "thd", "padding_causal", None)
    attention_over_context(rank, world_size, "thd", "padding_causal", (5, 0))
    if world_size == 2:
        attention_with_a_tail()
    x = torch.zeros(5, 1, 2, 4)
    with pytest.raises(ValueError, match=f"{5 * world_size} tokens cannot be cut in {2 * world_size} equal"):
        te.DotProductAttention(2, 4, cp_group=dist.group.WORLD)(x, x, x)


@pytest.mark.parametrize("world_size", [2, 3])
def test_context_parallel_attention_equals_one_rank(world_size):
    run_ranks(world_size, attention_layouts, before=stand_ins)
