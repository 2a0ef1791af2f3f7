"""The policy's own weights, shaken for a moment and given back bit for bit.

What moves with them belongs to the policy, what does not to the reference: an experiment that needs no learning rate,
and works on the first day of an adapter, when B = 0 and policy and reference are the same function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from megatron_bvpo.host.lora_start import ADAPTER


def adapters_begin_at_zero(models: Sequence[nn.Module]) -> bool:
    """Whether every B on this rank is 0, so that the adapters change nothing yet; True without adapters."""
    return not any(bool(b.any()) for model in models for _, b in _factors_b(model))


@contextmanager
def shaken_policy(models: Sequence[nn.Module], *, adapted: bool) -> Iterator[bool]:
    """Within this block the policy is another model; yields whether anything on this rank was shaken.

    Args:
        models: unwrapped chunks.
        adapted: B of the adapter that is trained is moved, else the model's norms and biases: what a reference of
            full tuning has copies of, and little enough to be kept.
    """
    steps = _steps_of_b if adapted else _steps_of_vectors
    moved = [(tensor, step) for model in models for tensor, step in steps(model)]
    kept = [tensor.detach().clone() for tensor, _ in moved]
    try:
        with torch.no_grad():
            for tensor, step in moved:
                tensor.add_(step * _signs(tensor))
        yield bool(moved)
    finally:
        with torch.no_grad():
            for (tensor, _), before in zip(moved, kept, strict=True):
                tensor.copy_(before)


def _factors_b(model: nn.Module) -> Iterator[tuple[LoraLayer, Tensor]]:
    for module in model.modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_B:
            for factor in module.lora_B[ADAPTER].parameters():
                yield module, factor


def _steps_of_b(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """A's rows have a length of 1/√3 at the start, so that these make an adapter as large as its layer's input."""
    for module, factor in _factors_b(model):
        yield factor, math.sqrt(3 / module.r[ADAPTER]) / abs(module.scaling[ADAPTER] or 1.0)


def _steps_of_vectors(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    for param in model.parameters():
        if param.dim() == 1 and param.is_floating_point():
            yield param, 0.5


def _signs(tensor: Tensor) -> Tensor:
    """+1 and −1 by turns along the first dimension, the same for each copy of a parameter."""
    signs = 1.0 - 2.0 * (torch.arange(len(tensor), device=tensor.device) % 2)
    return signs.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)
