"""Token losses of demonstrations, and what is summed of them. Pure.

Shapes: any; token losses stand where their log-probs stood.

A demonstration's loss is a mean over the counted tokens of the **global** batch: whoever calls adds the tokens of all
sequences up (stream_losses.py) and divides once by the count of all ranks. Neither source divides by the sum of the
factors.

Sources: DFT (arXiv 2508.05629), SFT-φ of CHORD (2508.11408).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_LOSSES = ("sft", "dft", "sft_phi")


def token_losses(logps: Tensor, kind: str) -> Tensor:
    """The loss of each token.

    Args:
        logps: log-probs of a demonstration's tokens, any shape, any float dtype. What does not count must hold a number
            (0 gives a loss of 0).
        kind: `sft`: −log p; `dft`: −sg[p]·log p; `sft_phi`: −sg[p(1 − p)]·log p. sg: no gradient flows through it.

    Returns:
        float64, of the shape of `logps`.

    Raises:
        ValueError: no such loss.
    """
    logps = logps.double()
    if kind == "sft":
        return -logps
    fixed = logps.detach()
    if kind == "dft":
        return -fixed.exp() * logps
    if kind == "sft_phi":
        # expm1: 1 − p of a token that is nearly certain would lose its digits, and with them the factor.
        return fixed.exp() * torch.expm1(fixed) * logps
    raise ValueError(f"{kind!r} is no loss of demonstrations; there are {', '.join(TOKEN_LOSSES)}")


@dataclass
class DemonstrationSums:
    """Of a stream that demonstrates: over counted tokens, and over whole responses."""

    tokens: Tensor
    loss: Tensor
    logps: Tensor
    responses: Tensor

    @property
    def count(self) -> Tensor:
        """What the stream's loss is a mean over."""
        return self.tokens

    @staticmethod
    def of(losses_P: Tensor, logps_P: Tensor, tokens_P: Tensor, weights_P: Tensor) -> DemonstrationSums:
        """Weighted sums over P demonstrations, from each one's summed token losses and log-probs; weight 0: nothing."""

        def total(values_P: Tensor) -> Tensor:
            return torch.where(weights_P > 0, weights_P * values_P.double(), 0.0).sum()

        return DemonstrationSums(total(tokens_P), total(losses_P), total(logps_P.detach()), weights_P.sum())

    def metrics(self, *, rpo: bool) -> dict[str, tuple]:
        """Log names, without the stream's prefix, to (sum, count)."""
        return {"nll_loss": (-self.logps, self.tokens), "logps/response": (self.logps, self.responses)}
