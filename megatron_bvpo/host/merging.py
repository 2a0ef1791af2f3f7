"""Adapters merged for a save, and the base weights given back to the last bit."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator

import psutil
import torch
import torch.distributed as dist
from mcore_bridge import LoraParallelLinear
from torch import Tensor, nn

from megatron_bvpo.errors import UserError
from megatron_bvpo.host import checkpoint as ckpt


def check_merge_memory(args, models: Iterable[nn.Module]) -> None:
    """Refuse at the start what would end a node at its first save. Collective."""
    if args.tuner_type == "full" or not (args.merge_lora and args.save_safetensors):
        return
    local = sum(p.numel() * p.element_size() for p in _merged_parameters(models))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    problem = ckpt.merge_needs_more(local, ranks, psutil.virtual_memory().available)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem and f"{socket.gethostname()}: {problem}")
    for told in dict.fromkeys(found):
        if told:
            alone = "give --merge_lora false and merge once after the run (swift export --merge_lora true)"
            beside = "train on more nodes, or keep Megatron's files alone (--save_safetensors false)"
            raise UserError(
                f"a merge keeps the base weights in host memory, which is too small on {told}",
                field="--merge_lora",
                remedy=beside if args.bvpo_new_layers_only else alone,
            )


class BaseWeights:
    """The weights that a merge changes. `W += d; W -= d` does not give W back in floating point, so they are kept."""

    def __init__(self):
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self, models: Iterable[nn.Module]) -> None:
        """Copy them to the host, before the merge."""
        self._kept = [(param, param.detach().to("cpu", copy=True)) for param in _merged_parameters(models)]

    def give_back(self) -> None:
        """After the merge was undone."""
        with torch.no_grad():
            for param, weight in self._kept:
                param.copy_(weight)
        self._kept = []


def _merged_parameters(models: Iterable[nn.Module]) -> Iterator[Tensor]:
    for model in models:
        for module in model.modules():
            if isinstance(module, LoraParallelLinear):
                yield from module.get_base_layer().parameters(recurse=False)
