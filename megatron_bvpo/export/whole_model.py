"""A model that was trained whole (or that a run has merged) with what training dropped of its base.

Megatron builds the layers that it knows. Those for multi-token prediction are not trained unless --mtp_num_layers asks
for them, and the saved model lacks them without a word: an engine that drafts with them would find nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.tensor_files import INDEX, SINGLE, Entry, ModelFiles

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MTP = re.compile(r"(?:^|\.)mtp[._]")
# Computed when a model is built; old checkpoints hold them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
CARRIED_FILE_BYTES = 1 << 30


def write_whole_model(saved: ModelFiles, base: ModelFiles, out: Path) -> list[str]:
    """Write the saved model and what it lacks of its base to `out`, a new folder; returns what is to be told of it.

    Raises:
        UserError: a tensor of another shape than the base's, or one that the saved model lacks and should have.
    """
    carried = carried_along(saved, base)
    parts = list(_parts(carried))
    n = len(saved.files) + len(parts)
    index: dict[str, str] = {}
    names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    renamed = dict(zip(saved.files, names, strict=False))
    for file, name in renamed.items():
        shutil.copyfile(file, out / name)
    index |= {tensor: renamed[entry.file] for tensor, entry in saved.entries.items()}
    for name, part in zip(names[len(saved.files) :], parts, strict=True):
        tensors = {}
        for tensor, entry in part.items():
            with safe_open(str(entry.file), framework="pt") as opened:
                tensors[tensor] = opened.get_tensor(tensor)
        save_file(tensors, str(out / name), metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    if n > 1:
        total = sum(e.end - e.start for e in (*saved.entries.values(), *carried.values()))
        table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (out / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (out / "config.json").write_text(
        json.dumps(_config(saved.config, base.config), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    told = [f"{len(saved.entries)} tensors are the checkpoint's"]
    if carried:
        told.append(f"{len(carried)} that training dropped are the base's, {min(carried)} for one")
    return told


def carried_along(saved: ModelFiles, base: ModelFiles) -> dict[str, Entry]:
    """The base's tensors that the saved model lacks, and may lack. Raises UserError for others."""
    layers = base.text_config.get("num_hidden_layers")
    tied = base.text_config.get("tie_word_embeddings", base.config.get("tie_word_embeddings"))
    carried, lost = {}, []
    for name, entry in base.entries.items():
        there = saved.entries.get(name)
        if there is not None and there.shape != entry.shape:
            raise UserError(
                f"{name} is {list(there.shape)} in the checkpoint and {list(entry.shape)} in the base",
                file=str(base.folder),
                field="--model",
                remedy="give the model that the run was started from",
            )
        if there is not None or _COMPUTED.search(name) or (tied and name == "lm_head.weight"):
            continue  # a copy of the embedding that was trained would be the old one
        layer = _LAYER.search(name)
        if _MTP.search(name) or (layer is not None and isinstance(layers, int) and int(layer[1]) >= layers):
            carried[name] = entry
        else:
            lost.append(name)
    if lost:
        raise UserError(
            f"the checkpoint lacks {len(lost)} tensors of the base that are no layers for multi-token prediction, "
            f"{lost[0]} for one",
            file=str(saved.folder),
            remedy="check that --model is what the run was started from; if so, train with --save_missing_weights true",
        )
    return carried


def _parts(entries: dict[str, Entry]) -> Iterator[dict[str, Entry]]:
    """In files of about a GiB, which is what they take in memory."""
    part: dict[str, Entry] = {}
    for name, entry in entries.items():
        if part and sum(e.end - e.start for e in part.values()) + entry.end - entry.start > CARRIED_FILE_BYTES:
            yield part
            part = {}
        part[name] = entry
    if part:
        yield part


def _config(saved: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's, with the base's word on layers for multi-token prediction."""
    mtp = {key: value for key, value in base.items() if "mtp" in key or "nextn" in key}
    inner = {key: _config(saved[key], value) for key, value in base.items() if key == "text_config" and key in saved}
    return {**saved, **mtp, **inner}
