"""Tensor- and sequence-parallel collectives with the gradients TE gives them.

Each is the adjoint of another: all-gather and reduce-scatter along dim 0; all-reduce with an identity
backward (the output is replicated, so its gradient already is), and the identity with an all-reduce backward
(the input is replicated, its gradients are partial). A group of one rank, or None, costs nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size(group) -> int:
    return 1 if group is None or not dist.is_initialized() else dist.get_world_size(group)


def rank(group) -> int:
    return 0 if group is None or not dist.is_initialized() else dist.get_rank(group)


def _gather(x: torch.Tensor, group) -> torch.Tensor:
    out = x.new_empty((x.shape[0] * world_size(group), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scatter_sum(x: torch.Tensor, group) -> torch.Tensor:
    ranks = world_size(group)
    if x.shape[0] % ranks:
        raise ValueError(
            f"cannot reduce-scatter {x.shape[0]} rows over {ranks} ranks: under sequence parallelism the "
            "sequence must be padded to a multiple of the tensor-parallel size."
        )
    out = x.new_empty((x.shape[0] // ranks, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _scatter_sum(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def all_gather(x: torch.Tensor, group) -> torch.Tensor:
    """[s, ...] on each of n ranks -> [n*s, ...]; backward sums and scatters."""
    return x if world_size(group) == 1 else _AllGather.apply(x, group)


def reduce_scatter(x: torch.Tensor, group) -> torch.Tensor:
    """[n*s, ...] partial on each of n ranks -> [s, ...] summed; backward gathers."""
    return x if world_size(group) == 1 else _ReduceScatter.apply(x, group)


def all_reduce(x: torch.Tensor, group) -> torch.Tensor:
    """Partial -> summed and replicated; backward is the identity."""
    return x if world_size(group) == 1 else _AllReduce.apply(x, group)


def replicated(x: torch.Tensor, group) -> torch.Tensor:
    """A replicated input of a column-parallel product; backward sums the ranks' partial gradients."""
    return x if world_size(group) == 1 else _Replicated.apply(x, group)
