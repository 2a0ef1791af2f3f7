"""The two streams of BVPO, their weights in the mixed loss, and what is reported of them. Pure.

L_c = alpha·L_t + (1 − alpha)·L_e, where L_t and L_e are means over the pairs of the **global** batch
(arXiv 2510.05095). A micro-batch holds any number of pairs of either stream, so it contributes
Σ_s w_s·Σ_pairs ℓ with w_t = alpha/N_t and w_e = (1 − alpha)/N_e; a mean of micro-batch means would
weigh a pair by the company it was packed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_bvpo.objective.preference import PairLogps, PairLosses

STREAMS = ("trace", "empty")


def mixing_factors(weights: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Factor of each stream's **sum** of pair losses in the mixed loss: weight/N, or 0 without pairs in this batch.

    Args:
        weights: each stream's.
        counts: N_s, pairs of each stream in the global batch; pairs of weight 0 do not count.
    """
    return {name: weight / counts[name] if counts[name] else 0.0 for name, weight in weights.items()}


@dataclass
class StreamSums:
    """Sums over pairs, one float64 scalar tensor each; adding two of these joins their pairs."""

    pairs: Tensor
    loss: Tensor
    nll: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    accuracies: Tensor
    margins: Tensor

    @staticmethod
    def width() -> int:
        return len(fields(StreamSums))

    @staticmethod
    def of(logps: PairLogps, losses: PairLosses, weights_P: Tensor) -> StreamSums:
        """Weighted sums over P pairs; a pair of weight 0 adds nothing, even if its values are not finite."""

        def total(values_P: Tensor) -> Tensor:
            return torch.where(weights_P > 0, weights_P * values_P.double(), 0.0).sum()

        # A tie counts half: with policy = reference every pair is one, and nothing is preferred yet.
        difference_P = losses.chosen_rewards - losses.rejected_rewards
        better = torch.heaviside(difference_P.double(), difference_P.new_full((), 0.5, dtype=torch.float64))
        return StreamSums(
            pairs=weights_P.sum(),
            loss=total(losses.loss),
            nll=total(losses.nll.detach()),
            chosen_logps=total(logps.chosen.detach()),
            rejected_logps=total(logps.rejected.detach()),
            chosen_rewards=total(losses.chosen_rewards),
            rejected_rewards=total(losses.rejected_rewards),
            accuracies=total(better),
            margins=total(difference_P),
        )

    def stack(self) -> Tensor:
        """[K] float64, detached; the inverse is `StreamSums(*vector)`."""
        return torch.stack([getattr(self, f.name).detach().double() for f in fields(self)])


def stream_metrics(
    trace: StreamSums, empty: StreamSums, weights: Mapping[str, float], *, rpo: bool
) -> dict[str, tuple]:
    """Log names to (sum, count); the trace stream keeps ms-swift's DPO names, the empty one adds `empty/`.

    `loss` is L_c of these pairs at `weights`. A stream without pairs reports nothing.
    """
    metrics: dict[str, tuple] = {}
    means = {name: s.loss / s.pairs for name, s in (("trace", trace), ("empty", empty)) if s.pairs > 0}
    if means:
        metrics["loss"] = (sum(weights[name] * mean for name, mean in means.items()), 1)
    for name, sums, prefix in (("trace", trace, ""), ("empty", empty, "empty/")):
        if name not in means:
            continue
        metrics[f"loss/{name}"] = (sums.loss, sums.pairs)
        metrics[f"{prefix}logps/chosen"] = (sums.chosen_logps, sums.pairs)
        metrics[f"{prefix}logps/rejected"] = (sums.rejected_logps, sums.pairs)
        metrics[f"{prefix}rewards/chosen"] = (sums.chosen_rewards, sums.pairs)
        metrics[f"{prefix}rewards/rejected"] = (sums.rejected_rewards, sums.pairs)
        metrics[f"{prefix}rewards/accuracies"] = (sums.accuracies, sums.pairs)
        metrics[f"{prefix}rewards/margins"] = (sums.margins, sums.pairs)
        if rpo:
            metrics[f"{prefix}nll_loss"] = (sums.nll, sums.pairs)
    return metrics
