"""What is logged of a step and of an evaluation: sums over members, brought together over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from swift.utils import get_current_device
from torch import Tensor

from megatron_bvpo.objective.stream_losses import StreamLosses, sums_of
from megatron_bvpo.objective.streams import stream_metrics


def reduced_metrics(
    sums: Tensor | None,
    losses: StreamLosses,
    weights: Mapping[str, float],
    group: dist.ProcessGroup,
) -> dict[str, tuple]:
    """Log names to (sum, count) over `group`; empty off the last stage.

    Args:
        sums: [S, K] float64, each stream's sums on this rank; None off the last stage.
        losses: of the run's S streams.
        weights: each stream's, in the mixed loss that is logged.
        group: the data-parallel ranks.
    """
    if sums is None:
        return {}
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    streams = zip(losses.streams, sums, strict=True)
    found = {stream: sums_of(stream, row, unpaired=losses.unpaired) for stream, row in streams}
    return stream_metrics(found, weights, rpo=bool(losses.preference.rpo_alpha))


def as_tensors(metrics: Mapping[str, tuple]) -> dict[str, Tensor]:
    """(sum, count) pairs as ms-swift aggregates them: float64 tensors of two numbers."""
    device = get_current_device()
    return {
        name: torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in pair])
        for name, pair in metrics.items()
    }
