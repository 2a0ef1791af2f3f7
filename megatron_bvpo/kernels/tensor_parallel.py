"""The few collectives that the log-probs need, over one tensor-parallel group or none.

Shapes: N tokens of the whole sequence, L = N / ranks of them on this rank under sequence parallelism, H
hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

# torch 2.13 renamed these two and warns at the old names; the training image has 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group, and whether hidden states come as this rank's chunk of the sequence.

    `group` None is one rank: every collective is then the identity.
    """

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def max_(self, x: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def gather_ints(self, values: list[int], device: torch.device) -> list[list[int]]:
        """`values` of every rank, in rank order (a device synchronisation)."""
        if self.size == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.int64, device=device)
        everyone = torch.empty(self.size * len(values), dtype=torch.int64, device=device)
        _all_gather(everyone, own, group=self.group)
        return everyone.view(self.size, len(values)).tolist()

    def gather_tokens(self, x_LH: torch.Tensor) -> torch.Tensor:
        """Every rank's hidden states under sequence parallelism; else the argument itself. [N, H]"""
        if not self.sequence_parallel or self.size == 1:
            return x_LH
        x_NH = x_LH.new_empty(x_LH.shape[0] * self.size, x_LH.shape[1])
        _all_gather(x_NH, x_LH.contiguous(), group=self.group)
        return x_NH

    def sum_tokens(self, partial_NH: torch.Tensor) -> torch.Tensor:
        """Partial gradients added over the ranks, and cut to this rank's tokens under sequence parallelism.

        May overwrite its argument. [L, H] or [N, H]
        """
        if self.size == 1:
            return partial_NH
        if not self.sequence_parallel:
            return self.sum_(partial_NH)
        local_LH = partial_NH.new_empty(partial_NH.shape[0] // self.size, partial_NH.shape[1])
        _reduce_scatter(local_LH, partial_NH, group=self.group)
        return local_LH

    def own_tokens(self, x_N: torch.Tensor) -> torch.Tensor:
        """This rank's part of a per-token vector that every rank holds whole. [L] or [N]"""
        if not self.sequence_parallel or self.size == 1:
            return x_N
        return x_N.tensor_split(self.size)[self.rank]
