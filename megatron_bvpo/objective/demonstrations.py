"""Token losses of demonstrations. Pure.

Shapes: any; token losses stand where their log-probs stood.

A demonstration's loss is a mean over the counted tokens of the **global** batch: whoever calls adds the tokens of all
sequences up (objective/sequence.py) and divides once by the count of all ranks. Neither source divides by the sum of
the factors.

Sources: DFT (arXiv 2508.05629), SFT-φ of CHORD (2508.11408).
"""

from __future__ import annotations

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
