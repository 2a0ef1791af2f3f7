"""RMSNorm and LayerNorm as functions: computed in at least float32, returned in the input's dtype."""

from __future__ import annotations

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps: float, zero_centered_gamma: bool) -> torch.Tensor:
    """x [..., H] / sqrt(mean(x^2) + eps) * gamma, with gamma = weight [H], or 1 + weight if zero-centered."""
    wide = _wide(x)
    gamma = _wide(weight) + 1 if zero_centered_gamma else _wide(weight)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * gamma).to(x.dtype)


def layer_norm(x, weight, bias, eps: float, zero_centered_gamma: bool) -> torch.Tensor:
    """(x [..., H] - mean) / sqrt(var + eps) * gamma + bias [H]."""
    wide = _wide(x)
    gamma = _wide(weight) + 1 if zero_centered_gamma else _wide(weight)
    return torch.nn.functional.layer_norm(wide, wide.shape[-1:], gamma, _wide(bias), eps).to(x.dtype)


def normalise(kind: str, x, weight, bias, eps: float, zero_centered_gamma: bool) -> torch.Tensor:
    """`kind` is TE's name: "RMSNorm" or "LayerNorm"."""
    if kind == "RMSNorm":
        return rms_norm(x, weight, eps, zero_centered_gamma)
    return layer_norm(x, weight, bias, eps, zero_centered_gamma)
