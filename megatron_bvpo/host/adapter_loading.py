"""Whether the model has a place for all of an adapter that was loaded into it.

mcore-bridge asks the file for the factors of the model's own adapted layers. Those of other layers stay unread: with
`--target_modules linear_qkv`, an adapter of all layers loses its experts without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.adapter_folders import WEIGHTS


def require_all_loaded(bridge, models: Sequence[torch.nn.Module], folder: str, *, flag: str, adapter_name: str) -> None:
    """Raise UserError on all ranks where the file holds factors that no layer has. Collective.

    Args:
        bridge: mcore-bridge's, of the models.
        models: this rank's unwrapped chunks.
        folder: that the adapter was loaded from.
        flag: which named it.
        adapter_name: its name in the models.
    """
    exported = bridge.export_weights(
        list(models), target_device="cpu", only_master_rank=True, peft_format=True, adapter_name=adapter_name
    )
    here = {name for name, tensor in exported if tensor is not None}
    left: list = [None]
    if dist.get_rank() == 0:
        with safe_open(str(Path(folder) / WEIGHTS), framework="pt") as saved:
            left = [sorted(name for name in set(saved.keys()) - here if ".lora_" in name)]
    dist.broadcast_object_list(left, src=0)
    if left[0]:
        raise UserError(
            f"{len(left[0])} of its tensors have no place in this run's layers, {left[0][0]} for one",
            file=str(Path(folder) / WEIGHTS),
            field=f"--{flag}",
            remedy="give the --target_modules that it was trained with (all-linear leaves the router out: "
            "all-linear all-router has it)",
        )
