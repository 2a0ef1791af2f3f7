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

import megatron_bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import versions

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
    "megatron_extra_kwargs",
    "bvpo_logp_impl",
    "new_special_tokens",
)
# ms-swift gives a reference adapter the run's own settings, not those of its adapter_config.json.
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "use_rslora", "lora_bias", "target_modules", "modules_to_save")
# An upgrade that mends a fault must not find the faulty numbers.
PACKAGES = ("mcore-bridge", "megatron-core", "transformer-engine")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
# What gives the shapes, and what says which of the weights are loaded.
NAMES = ("config.json", "adapter_config.json", "model.safetensors.index.json")
WHICH = (".metadata", "latest_checkpointed_iteration.txt")


def reference_folders(args: Any) -> dict[str, str]:
    """The folders that the reference is loaded from, by role; a model of a hub has been fetched by now."""
    model_dir = args.model_info.model_dir
    if args.tuner_type == "full" or args.bvpo_new_layers_only:  # which has one reference, adapters or not
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
    """Files by `role/relative path`: the weights, and what gives their shapes. Tokens come with the pairs.

    Raises:
        UserError: a folder that must hold weights holds none.
    """
    found = {}
    for role, folder in folders.items():
        weights = 0
        for path in sorted(Path(folder).rglob("*")):
            wanted = path.name in NAMES
            if role != "shape":
                weights += path.suffix in WEIGHTS
                wanted = wanted or path.suffix in WEIGHTS or path.name in WHICH
            if wanted and path.is_file():
                found[f"{role}/{path.relative_to(folder)}"] = path
        if not weights and role != "shape":
            raise UserError(
                "no weight file was found, so nothing says which reference this is",
                file=str(folder),
                field="--bvpo_ref_cache",
                remedy=f"expected files ending in {', '.join(WEIGHTS)}; leave the flag out to go on without a cache",
            )
    return found


def key_of(files: dict[str, str], args: Any) -> tuple[str, dict]:
    """(32 hexadecimal digits, what they were made of) from the files' digests and the run's settings."""
    settings = [*SETTINGS, *(ADAPTER_SETTINGS if any(name.startswith("adapter/") for name in files) else ())]
    if args.bvpo_new_layers_only:
        settings.append("bvpo_new_layers_only")  # of the same files, another reference
    if args.new_special_tokens:
        settings.append("seed")  # their rows are random
    description = {
        "files": files,
        "settings": {name: str(getattr(args, name)) for name in settings},
        "packages": {name: versions.installed(name) for name in PACKAGES} | {"ours": megatron_bvpo.__version__},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32], description


def reference_key(args: Any) -> tuple[str, dict]:
    """The key of this run's reference, and what it was made of; the same on all ranks. Collective.

    Raises:
        UserError: on all ranks, if one of them finds no weights or cannot read a file.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    listed: list = [None, None]
    if rank == 0:  # one rank's view: a file that another does not see is an error there, not a file left out
        try:
            files = reference_files(reference_folders(args))
            # Large files first, so that the ranks' shares are alike.
            listed[0] = sorted(files.items(), key=lambda item: (-os.path.getsize(item[1]), item[0]))
        except UserError as e:
            listed[1] = e
    dist.broadcast_object_list(listed, src=0)
    if listed[1] is not None:
        raise listed[1]
    mine, problem = {}, None
    for name, path in listed[0][rank::ranks]:
        try:
            with path.open("rb") as file:
                mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            problem = problem or f"{path}: {e.strerror or e}"
    parts: list = [None] * ranks
    dist.all_gather_object(parts, (mine, problem))
    for _, told in parts:
        if told:
            raise UserError(
                f"a file of the reference cannot be read on every node: {told}",
                field="--bvpo_ref_cache",
                remedy="put the model on a disk that all nodes share, or leave the flag out",
            )
    return key_of({name: digest for part, _ in parts for name, digest in part.items()}, args)
