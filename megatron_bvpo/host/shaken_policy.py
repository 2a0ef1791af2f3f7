"""The policy's own weights, shaken for a moment and given back bit for bit.

What moves with them belongs to the policy, what does not to the reference: an experiment that needs no learning rate,
and works on the first day of an adapter, when B = 0 and policy and reference are the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from megatron_bvpo.host.grown_layers import steps_of_new_layers
from megatron_bvpo.host.lora_start import ADAPTER


def adapters_begin_at_zero(models: Sequence[nn.Module]) -> bool:
    """Whether every B on this rank is 0, so that the adapters change nothing yet; True without adapters."""
    return not any(bool(b.any()) for model in models for _, b in _factors_b(model))


@contextmanager
def shaken_policy(
    models: Sequence[nn.Module], *, adapted: bool, new_layers: Sequence[int] = ()
) -> Iterator[Callable[[float], bool]]:
    """Yields `shake(scale)`, which makes the policy another model until the block ends.

    It returns whether there is anything to shake on this rank. A scale of 1 is as large as what the layers read, and
    would send all tokens to the same few experts: begin far below.

    Args:
        models: unwrapped chunks.
        adapted: B of the adapter that is trained is moved.
        new_layers: of a grown model, where they are trained: they are moved, and not what the reference shares. With
            neither it is the model's norms and biases: what a reference of full tuning has copies of, and little enough
            to be kept.
    """
    moved = list(steps_of_new_layers(models, new_layers))
    if adapted or not new_layers:
        steps = _steps_of_b if adapted else _steps_of_vectors
        moved += [found for model in models for found in steps(model)]
    kept = [(tensor, step, tensor.detach().clone()) for tensor, step in moved]

    @torch.no_grad()
    def shake(scale: float) -> bool:
        for tensor, step, before in kept:
            tensor.copy_(before + scale * step * _signs(tensor) if scale else before)
        return bool(kept)

    try:
        yield shake
    finally:
        shake(0.0)


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
            yield param, 1.0


def _signs(tensor: Tensor) -> Tensor:
    """+1 and −1 by turns along the first dimension, the same for each copy of a parameter."""
    signs = 1.0 - 2.0 * (torch.arange(len(tensor), device=tensor.device) % 2)
    return signs.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)
