"""Megatron's gradient buffers: buckets, their padding, and which slice a data-parallel rank owns.

The same arithmetic as `_ParamAndGradBuffer.__init__` of megatron-core 0.16.1: with the distributed optimizer a
parameter starts at a multiple of 64 elements and a bucket ends at a multiple of lcm(ranks, 128).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bvpo.planning.tensors import Tensor


@dataclass(frozen=True)
class Bucket:
    """Elements [start, end) of a buffer, and the ranges in it that parameters fill."""

    start: int
    end: int
    params: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Buffer:
    """One buffer of one model chunk: dense parameters, or experts.

    Attributes:
        expert: it holds experts.
        ranks: size of the group over which the gradients are reduced.
        sharded: each of them owns one slice of each bucket (the distributed optimizer).
    """

    buckets: tuple[Bucket, ...]
    expert: bool
    ranks: int
    sharded: bool

    @property
    def elements(self) -> int:
        return self.buckets[-1].end if self.buckets else 0

    @property
    def shard_elements(self) -> int:
        """Elements of the gradient that are valid on one rank: what a probe keeps copies of."""
        return self.elements // self.ranks if self.sharded else self.elements

    def owned_elements(self, rank: int = 0) -> int:
        """Elements of parameters, padding left out, whose optimizer state `rank` holds."""
        owned = 0
        for bucket in self.buckets:
            low, high = bucket.start, bucket.end
            if self.sharded:
                share = (high - low) // self.ranks
                low, high = low + rank * share, low + (rank + 1) * share
            owned += sum(max(0, min(end, high) - max(start, low)) for start, end in bucket.params)
        return owned


def make_buffer(
    tensors: Sequence[Tensor], *, expert: bool, ranks: int, sharded: bool, bucket_size: int | None
) -> Buffer:
    """Lay out the trained ones of `tensors` of one kind, last first, as Megatron does.

    Args:
        expert: lay out the experts' tensors, else the dense ones.
        bucket_size: elements after which a bucket is closed; None: one bucket.
    """
    divisor = math.lcm(ranks, 128) if sharded else 1
    align = 64 if sharded else 1
    buckets: list[Bucket] = []
    params: list[tuple[int, int]] = []
    bucket_start = position = 0

    def close(end: int) -> int:
        nonlocal bucket_start, params
        end = -(-end // divisor) * divisor
        buckets.append(Bucket(bucket_start, end, tuple(params)))
        bucket_start, params = end, []
        return end

    for tensor in reversed([t for t in tensors if t.trained and t.expert == expert]):
        alone = tensor.shared_embedding and sharded
        position = -(-position // align) * align
        if alone and params:
            position = close(position)
        params.append((position, position + tensor.elements))
        position += tensor.elements
        if alone or (bucket_size is not None and position - bucket_start >= bucket_size):
            position = close(position)
    if params:
        close(position)
    return Buffer(tuple(buckets), expert, ranks, sharded)
