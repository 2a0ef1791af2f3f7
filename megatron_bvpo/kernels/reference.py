"""The contract: what every path of `target_logps` has to equal, in float64 and with nothing clever.

Shapes: N tokens, H hidden size, V vocabulary rows (all of them, padding last).
"""

from __future__ import annotations

import torch


def reference_logps(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """log softmax(hidden · weightᵀ)[target] in float64, 0 for ignored targets; differentiable by autograd.

    Rows of `weight_VH` from `vocab_size` on are padding and no part of the softmax. Inputs of any floating
    dtype are taken as exact. Returns float64 [N]. Holds the whole [N, V] logits: for tests and small sizes.
    """
    logits_NV = hidden_NH.double() @ weight_VH[:vocab_size].double().T
    kept_N = targets_N != ignore_index
    safe_N = targets_N.where(kept_N, 0)
    logps_N = torch.log_softmax(logits_NV, dim=-1).gather(1, safe_N[:, None]).squeeze(1)
    return logps_N.where(kept_N, 0.0)


def reference_grads(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    upstream_N: torch.Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps_N, d hidden_NH, d weight_VH) of Σ upstream·logps, all float64."""
    hidden = hidden_NH.detach().double().requires_grad_()
    weight = weight_VH.detach().double().requires_grad_()
    logps = reference_logps(hidden, weight, targets_N, vocab_size=vocab_size, ignore_index=ignore_index)
    grad_hidden, grad_weight = torch.autograd.grad(logps, (hidden, weight), upstream_N.double())
    return logps.detach(), grad_hidden, grad_weight
