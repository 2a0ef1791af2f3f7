"""The streams' weights in the mixed loss, and what is reported of each. Pure.

L = (1 − m)·Σ_j w_j·L_j + m·L_x (MATH.md §1, §5, §6): L_j is a mean over the pairs of the **global** batch (arXiv
2510.05095), L_x a mean over the counted tokens of its demonstrations. A micro-batch holds any number of members of a
stream, so it contributes Σ_s w_s/N_s·Σ ℓ; a mean of micro-batch means would weigh a pair by the company it was packed
with, and a token by that of its sequence.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bvpo.objective.stream_losses import Sums
from megatron_bvpo.streams import TABLE


def mixing_factors(weights: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Factor of each stream's **sum** of losses in the mixed loss: weight/N, or 0 without members in this batch.

    Args:
        weights: each stream's.
        counts: N_s, pairs of each stream in the global batch, or counted tokens of its demonstrations; members of
            weight 0 do not count.
    """
    return {name: weight / counts[name] if counts[name] else 0.0 for name, weight in weights.items()}


def stream_metrics(sums: Mapping[str, Sums], weights: Mapping[str, float], *, rpo: bool) -> dict[str, tuple]:
    """Log names to (sum, count); the trace stream keeps ms-swift's DPO names, the others' begin with their own.

    `loss` is the mixed loss of these members at `weights`; streams that these lack are not mixed in. A stream without
    members reports nothing.
    """
    metrics: dict[str, tuple] = {}
    means = {name: s.loss / s.count for name, s in sums.items() if s.count > 0}
    mixed = [weights[name] * mean for name, mean in means.items() if name in weights]
    if mixed:
        metrics["loss"] = (sum(mixed), 1)
    for name in means:
        prefix = TABLE[name].log_prefix
        metrics[f"loss/{name}"] = (sums[name].loss, sums[name].count)
        metrics |= {f"{prefix}{key}": value for key, value in sums[name].metrics(rpo=rpo).items()}
    return metrics
