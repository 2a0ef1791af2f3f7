"""Token log-probs to sequence log-probs, for packed and padded batches, with context parallelism.

Shapes: B rows of a padded batch, S tokens of a row on this rank, T tokens of a pack on this rank,
Q sequences of the batch (twice the pairs).

Everything is summed in float64. At 32k tokens a float32 sum of a trace's log-probs is wrong in the
third digit of the difference to the reference, and that difference is all a preference loss sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100


class _SumOverContextParallel(torch.autograd.Function):
    """All-reduce forward, identity backward: every rank's loss is the same function of the sum."""

    @staticmethod
    def forward(ctx, values: Tensor, group) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def sum_over_context_parallel(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `values` over the context-parallel ranks; the gradient of the result passes through unchanged.

    The gradient of a rank's own tokens is then d(loss)/d(sum), as it should be: each rank holds other
    tokens of the same sequence, and Megatron adds the ranks' parameter gradients afterwards.
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    return _SumOverContextParallel.apply(values, group)


def sequence_sums(values: Tensor, seq_lens_Q: Tensor | None) -> Tensor:
    """Sum per-token values over each sequence.

    Args:
        values: [1, T] of a pack, or [B, S] of a padded batch; any float dtype.
        seq_lens_Q: for a pack, the number of this rank's tokens of each sequence, int64, on the device
            of `values`; tokens after the last sequence are padding. None for a padded batch.

    Returns:
        [Q] float64; differentiable.
    """
    if seq_lens_Q is None:
        return values.double().sum(dim=-1)
    # Not a scatter-add: a GPU adds its float64 terms in any order, and two runs would differ in the last bit.
    tokens_T = values[0].double()
    ends_Q = seq_lens_Q.cumsum(0)
    sequence_T = torch.searchsorted(ends_Q, torch.arange(tokens_T.numel(), device=tokens_T.device), right=True)
    numbers_Q = torch.arange(seq_lens_Q.numel(), device=tokens_T.device)
    return torch.where(sequence_T == numbers_Q[:, None], tokens_T, 0.0).sum(dim=-1)


def sequence_logps(
    logps: Tensor,
    labels: Tensor,
    seq_lens_Q: Tensor | None,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response, and the number of its tokens.

    Args:
        logps: log-probs of the label tokens, [1, T] or [B, S], float32 or wider. Values where the label
            is ignored may be anything, even NaN.
        labels: token ids aligned with `logps`; -100 marks tokens that do not count.
        seq_lens_Q: see `sequence_sums`.
        cp_group: group that holds the other parts of the same sequences, or None.

    Returns:
        (sums_Q, counts_Q), both float64 and equal on all ranks of `cp_group`.
    """
    counted = labels != IGNORE_INDEX
    logps = _counted_alone(logps, counted)
    sums_Q = sum_over_context_parallel(sequence_sums(logps, seq_lens_Q), cp_group)
    with torch.no_grad():
        counts_Q = sum_over_context_parallel(sequence_sums(counted.double(), seq_lens_Q), cp_group)
    return sums_Q, counts_Q


def sequence_losses(
    logps: Tensor,
    labels: Tensor,
    seq_lens_Q: Tensor | None,
    cp_group: dist.ProcessGroup | None,
    token_losses: Callable[[Tensor], Tensor],
) -> Tensor:
    """Each response's sum of token losses, [Q] float64, equal on all ranks of `cp_group`.

    Args:
        logps, labels, seq_lens_Q, cp_group: as `sequence_logps` takes them.
        token_losses: log-probs of tokens → their losses, of the same shape; 0 where the log-prob is 0.
    """
    counted = labels != IGNORE_INDEX
    losses = _counted_alone(token_losses(_counted_alone(logps, counted)), counted)
    return sum_over_context_parallel(sequence_sums(losses, seq_lens_Q), cp_group)


def _counted_alone(values: Tensor, counted: Tensor) -> Tensor:
    """`values` with 0 where a token does not count, whatever stands there."""
    return torch.where(counted, values, torch.zeros((), dtype=values.dtype, device=values.device))
