"""Finalised gradients of this rank: taken aside, mixed, and put back in Megatron's buffers.

After `finalize_model_grads` a rank's gradients lie in the buffers of Megatron's DDP. With the distributed
optimizer only the rank's own slice of each bucket is valid, and only that is kept: a probe of k streams costs
2k − 1 times the gradient shard (2k where something follows that is not measured), not 2k models. Without it the
whole buffer is valid and kept.

Shapes: E elements of one slice of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """A part of a gradient buffer that is valid on this rank.

    Attributes:
        grad_E: view into the buffer.
        counted: [start, end) ranges of `grad_E` that this rank counts in sums over parameters; what another
            tensor-parallel rank or pipeline stage counts (replicas, tied embeddings) and padding is left out.
        copies: how many ranks hold, and count, this very slice: with the distributed optimizer the number of its
            instances, usually 1; else the size of its data-parallel group.
    """

    grad_E: Tensor
    counted: tuple[tuple[int, int], ...]
    copies: int


def clear(models: Iterable, optimizer) -> None:
    """Empty the buffers of all DDP-wrapped model chunks, and what the optimizer keeps beside them."""
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()


def gradient_slices(models: Iterable, *, tp_rank: int) -> list[Slice]:
    """Slices of all DDP-wrapped model chunks of this rank.

    Whether a parameter is counted here follows Megatron's `tensor_model_parallel` and `shared` marks, which
    host/parallel_attributes.py has put right.
    """
    slices = []
    for model in models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            ranks = dist.get_world_size(buffer.data_parallel_group)
            sharded = buffer.ddp_config.use_distributed_optimizer
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel()
                start, length = 0, size
                if sharded:
                    length = size // ranks
                    start = dist.get_rank(buffer.data_parallel_group) * length
                offset = bucket.offset + start  # of the slice in the buffer
                ranges = []
                for param, (first, last, _) in sorted(buffer.param_index_map.items(), key=lambda item: item[1][0]):
                    first, last = max(first - offset, 0), min(last - offset, length)
                    if first < last and _counted_here(param, tp_rank):
                        ranges.append((first, last))
                slices.append(
                    Slice(
                        grad_E=bucket.grad_data[start : start + length],
                        counted=_merged(ranges),
                        # Each instance of the distributed optimizer has a whole set of shards.
                        copies=buffer.ddp_config.num_distributed_optimizer_instances if sharded else ranks,
                    )
                )
    return slices


def _counted_here(param: Tensor, tp_rank: int) -> bool:
    """One rank counts a parameter: shards all, replicas on TP rank 0, a tied embedding on the first stage."""
    if getattr(param, "shared", False):
        return False
    return bool(getattr(param, "tensor_model_parallel", False)) or tp_rank == 0


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def take(slices: Sequence[Slice]) -> list[Tensor]:
    """Copies of the slices' gradients."""
    return [s.grad_E.clone() for s in slices]


def mix_in(slices: Sequence[Slice], own: float, parts: Sequence[tuple[float, Sequence[Tensor]]]) -> None:
    """Make the buffers own·(what they hold) + Σ weight·gradient.

    `parts` are (weight, gradients as `take` gave them).
    """
    for i, s in enumerate(slices):
        s.grad_E.mul_(own)
        for weight, gradients in parts:
            s.grad_E.add_(gradients[i], alpha=weight)
