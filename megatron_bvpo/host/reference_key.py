"""What a reference is, in one key: the bytes of its weight files, and the settings that change its log-probs.

Whole files are hashed, not names and dates: a key must never stand for other weights. The files are dealt
out over the ranks, so that 470 GB on 64 ranks are 7 GB each, right after they were read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How a reference's log-probs are computed. Layouts are not here: they change the rounding only.
SETTINGS = (
    "model_type",
    "template",
    "torch_dtype",
    "attention_backend",
    "attention_softmax_in_fp32",
    "fp8_format",
    "fp8_recipe",
    "fp8_param_gather",
    "fp4_format",
    "fp4_recipe",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "rope_scaling",
    "bvpo_logp_impl",
    "new_special_tokens",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")
SHAPES = ("config.json", "adapter_config.json")


def reference_folders(args: Any) -> dict[str, str]:
    """The folders that the reference is loaded from, by role. Paths must be local by now."""
    model_dir = args.model_info.model_dir
    if args.tuner_type == "full":
        if args.mcore_ref_model:
            return {"reference": args.mcore_ref_model, "shape": model_dir}
        ref_model = args.ref_model or args.model
        return {"reference": model_dir if ref_model == args.model else _local(args, ref_model)}
    folders = {"reference": args.mcore_model or model_dir, "shape": model_dir}
    adapter = args.mcore_ref_adapter or next(iter(args.ref_adapters or []), None)
    if adapter:
        folders["adapter"] = adapter
    return folders


def _local(args: Any, model: str) -> str:
    from swift.utils import safe_snapshot_download

    return safe_snapshot_download(model, use_hf=args.use_hf, hub_token=args.hub_token)


def reference_files(folders: dict[str, str]) -> dict[str, Path]:
    """Files by `role/relative path`: the weights, and what gives their shapes. Tokens come with the pairs."""
    found = {}
    for role, folder in folders.items():
        for path in sorted(Path(folder).rglob("*")):
            is_weight = path.suffix in WEIGHTS and role != "shape"
            if path.is_file() and (path.name in SHAPES or is_weight):
                found[f"{role}/{path.relative_to(folder)}"] = path
    return found


def reference_key(args: Any) -> tuple[str, dict]:
    """(32 hexadecimal digits, what they were made of); the same on all ranks. Collective."""
    files = reference_files(reference_folders(args))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Large files first, so that the ranks' shares are alike.
    names = sorted(files, key=lambda name: (-os.path.getsize(files[name]), name))
    mine = {name: _digest(files[name]) for name in names[rank::ranks]}
    parts: list = [None] * ranks
    dist.all_gather_object(parts, mine)
    description = {
        "files": {name: digest for part in parts for name, digest in sorted(part.items())},
        "settings": {name: str(getattr(args, name)) for name in SETTINGS},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32], description


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
