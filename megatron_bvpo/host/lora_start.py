"""LoRA's A factors at the start of a run: the same in every parallel layout, drawn as one rank draws them.

mcore-bridge draws each rank's own tensor, and three things come out wrong:

- A of a row-parallel layer (attention output, second MLP layer) is sharded along its input, and the shard is drawn as
  if it were the whole: uniform in ±1/√(input/TP), so its standard deviation grows by √TP.
- A of a column-parallel layer, the same on all tensor-parallel ranks, is drawn from each rank's default generator:
  ranks whose generators are not in step hold different "copies", which nothing ever brings together.
- An expert's A depends on which rank holds it, and all expert-parallel layouts start from other weights.

Here every factor is drawn whole, from a generator seeded with the run's seed and the factor's name, and cut. B stays 0.

Shapes: R rank, I input features of the whole layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from megatron_bvpo.gradients.groups import ParallelGroups

ADAPTER = "default"


def draw_lora_a(model: nn.Module, seed: int, groups: ParallelGroups) -> None:
    """Draw the A factors of one unwrapped Megatron model (chunk) anew, in place.

    Args:
        model: with LoRA layers that hold nothing trained yet.
        seed: the run's own. The same seed gives the same weights in every layout.
        groups: this rank's place.
    """
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            for name, weight_RI in _factors(model, path, module, groups):
                _draw(weight_RI, f"{seed} {name}", *_shard(module, groups))


def _factors(model: nn.Module, path: str, module: LoraLayer, groups: ParallelGroups) -> Iterator[tuple[str, Tensor]]:
    """(name in the whole model, A) of a layer; of every expert for a layer of grouped experts."""
    factor = module.lora_A[ADAPTER]
    name = whole_name(model, path, groups.ep_rank)
    if not hasattr(factor, "num_gemms"):
        yield name, factor.weight
        return
    for i in range(factor.num_gemms):
        yield f"{name} expert {groups.ep_rank * factor.num_gemms + i}", getattr(factor, f"weight{i}")


def whole_name(model: nn.Module, path: str, ep_rank: int) -> str:
    """`path` with numbers that count in the whole model: a pipeline stage and an expert rank count from 0."""
    parts = path.split(".")
    parent = model
    for i, part in enumerate(parts):
        module = parent.get_submodule(part)
        if part.isdigit():
            if hasattr(module, "layer_number"):
                parts[i] = f"layer {module.layer_number}"
            elif i and parts[i - 1] == "local_experts":
                parts[i] = f"expert {ep_rank * len(parent) + int(part)}"
        parent = module
    return ".".join(parts)


def _shard(module: LoraLayer, groups: ParallelGroups) -> tuple[int, int]:
    """(this rank's part, number of parts) of A along its input. Experts are not cut: mcore-bridge refuses that."""
    if getattr(module, "is_parallel_a", False) and module.tp_size > 1 and not module.is_expert:
        return groups.tp_rank, groups.tp_size
    return 0, 1


@torch.no_grad()
def _draw(weight: Tensor, name: str, part: int, parts: int) -> None:
    """peft's own rule, Kaiming-uniform with a = √5: uniform in ±1/√I, I of the whole layer."""
    shape = list(weight.shape)
    shape[1] *= parts
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    # On the host, in float32: the same numbers whatever the device, and whatever the run's dtype.
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    whole = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    weight.copy_(whole.chunk(parts, dim=1)[part])
