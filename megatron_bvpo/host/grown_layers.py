"""A model grown by `bvpo expand`: its new layers are trained, alone or beside adapters on the old ones, and without
both it is the reference.

The numbers of the new layers are in config.json. Megatron numbers a stage's parameters from 0, so that a pattern of
ms-swift's `--trainable_parameters_regex` means other layers on every pipeline stage: layers are found by their own
number here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from peft.tuners.lora.layer import LoraLayer
from swift.utils import freeze_parameters
from torch import Tensor, nn

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.new_layers import KEY

FLAG = "--bvpo_new_layers_only"


def new_layer_numbers(config: Any, folder: str) -> tuple[int, ...]:
    """The numbers of a model's new layers, from 0.

    Args:
        config: of Hugging Face.
        folder: the model's, for errors.

    Raises:
        UserError: the model was not grown.
    """
    found = getattr(config, KEY, None)
    layers = config.num_hidden_layers
    numbers = isinstance(found, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    if not numbers or not found or not all(0 <= n < layers for n in found):
        raise UserError(
            f"config.json's {KEY} is {found!r}: the model has no layers that are known to be new",
            file=folder,
            field=FLAG,
            remedy="make the model with bvpo expand, or leave the flag out",
        )
    return tuple(sorted(found))


def layers_with(models: Sequence[nn.Module], numbers: Sequence[int]) -> list[TransformerLayer]:
    """Those of this rank's layers whose numbers in the whole model are among `numbers`."""
    wanted = set(numbers)
    layers = [m for model in models for m in model.modules() if isinstance(m, TransformerLayer)]
    return [layer for layer in layers if layer.layer_number - 1 in wanted]


def train_only(models: Sequence[nn.Module], numbers: Sequence[int]) -> None:
    """Freeze all parameters but those of these layers; what is frozen already stays so."""
    trained = {id(p) for layer in layers_with(models, numbers) for p in layer.parameters()}
    for model in models:
        for parameter in model.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad = False


def train_beside_adapters(models: Sequence[nn.Module], numbers: Sequence[int], frozen: str | None = None) -> None:
    """Train these layers whole, without the adapters that peft has put on them; the other layers keep theirs.

    peft's own way (modules_to_save) copies what it trains, and a Megatron layer holds process groups. Adapters are put
    on all layers first because peft knows layers by a stage's numbers, and stops at a stage that has none of them.

    Args:
        frozen: --freeze_parameters_regex, which ms-swift reads in full tuning only.
    """
    for layer in layers_with(models, numbers):
        for name, module in list(layer.named_modules()):
            if isinstance(module, LoraLayer):
                layer.set_submodule(name, module.get_base_layer())
        layer.requires_grad_(True)
    for model in models if frozen else ():
        freeze_parameters(model, 0.0, [], frozen)


def names_of(models: Sequence[nn.Module], numbers: Sequence[int]) -> list[tuple[str, ...]]:
    """For each of this rank's chunks, what the names of these layers' parameters begin with."""
    layers = {id(layer) for layer in layers_with(models, numbers)}
    return [tuple(f"{name}." for name, m in model.named_modules() if id(m) in layers) for model in models]


@contextmanager
def without_layers(
    reference: Callable[[], AbstractContextManager], models: Sequence[nn.Module], numbers: Sequence[int]
) -> Iterator[Sequence[nn.Module]]:
    """A grown model's reference: these models in ms-swift's own context, which switches adapters off, and with these
    layers switched off, too: each gives on what it gets. The others' weights are shared, so they must be frozen."""
    layers = layers_with(models, numbers)
    with reference():
        for layer in layers:
            layer.forward = _give_on
        try:
            yield models
        finally:
            for layer in layers:
                del layer.forward  # the class's own again


def _give_on(hidden_states: Tensor, *args, context: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
    return hidden_states, context


def add_nothing(models: Sequence[nn.Module], numbers: Sequence[int]) -> bool:
    """Whether all that these layers add to the residual stream is zero, as it is before the first step."""
    found = [p for layer in layers_with(models, numbers) for name, p in layer.named_parameters() if _leads_back(name)]
    return not any(bool(p.any()) for p in found)


def _leads_back(name: str) -> bool:
    return ".linear_proj." in f".{name}" or ".linear_fc2." in f".{name}"


def steps_of_new_layers(models: Sequence[nn.Module], numbers: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
    """What shakes the policy alone: attention's last product of this rank's first new layer, with a step that makes
    its output as large as its input."""
    for layer in layers_with(models, numbers)[:1]:
        weight = layer.self_attention.linear_proj.weight
        yield weight, 1 / math.sqrt(weight.shape[1])
