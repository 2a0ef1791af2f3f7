"""A base model and an adapter as one model, file by file.

Each file of the base is copied as it is, and the adapted rows are written over in the copy: whatever the base has and
training does not know (MTP, a vision tower) is carried along, and what is in memory is a chunk of one tensor.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.adapter import Adapter, Update, updates
from megatron_bvpo.export.tensor_files import INDEX, TYPES, Entry, ModelFiles, read_rows

# Rows are updated in float64, this many bytes of them at a time.
CHUNK = 16 << 20


def merge(model: ModelFiles, adapter: Adapter, out: Path) -> list[str]:
    """Write W + scale · B @ A in the base's own types to `out`, a new folder; returns what is to be told of it.

    Sums are taken in float64 and rounded once.

    Raises:
        UserError: an adapter of another model, or a base that is quantised.
    """
    found = updates(adapter, model.shapes, str(model.folder))
    _check_base(model, adapter, found)
    for file in model.files:
        copied = out / file.name
        shutil.copyfile(file, copied)
        for name, entry in model.entries.items():
            if entry.file == file and (name in found or name in adapter.whole):
                _write_over(copied, entry, name, found.get(name, []), adapter)
    if (model.folder / INDEX).is_file():
        shutil.copyfile(model.folder / INDEX, out / INDEX)
    n = sum(name in found or name in adapter.whole for name in model.entries)
    return [f"{n} of {len(model.entries)} tensors were merged, the others are the base's"]


def _check_base(model: ModelFiles, adapter: Adapter, found: dict[str, list[Update]]) -> None:
    if model.config.get("quantization_config"):
        raise UserError(
            "the base is quantised, and nothing can be added to its weights",
            file=str(model.folder / "config.json"),
            field="quantization_config",
            remedy="give the same model in bfloat16 with --model, or serve the adapter (without --merge)",
        )
    for name in (*found, *adapter.whole):
        if model.entries[name].dtype not in TYPES:
            raise UserError(
                f"{name} is {model.entries[name].dtype}, and nothing can be added to that",
                file=str(model.entries[name].file),
                field="--model",
                remedy="give the same model in bfloat16 with --model, or serve the adapter (without --merge)",
            )
    tied = model.text_config.get("tie_word_embeddings", model.config.get("tie_word_embeddings"))
    heads = [name for name in (*found, *adapter.whole) if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    if tied and heads:
        raise UserError(
            f"{heads[0]} is adapted, and the model has one matrix for its input and its output",
            file=str(model.folder / "config.json"),
            field="tie_word_embeddings",
            remedy="serve the adapter (without --merge)",
        )


def _write_over(file: Path, entry: Entry, name: str, changes: list[Update], adapter: Adapter) -> None:
    """Change the rows of one tensor in a copy of its file."""
    width, dtype = entry.shape[-1] if entry.shape else 1, TYPES[entry.dtype]
    step = max(1, CHUNK // (8 * width))
    with file.open("r+b") as stream:

        def write(first: int, rows: torch.Tensor) -> None:
            stream.seek(entry.start + first * width * dtype.itemsize)
            stream.write(rows.contiguous().view(torch.uint8).numpy().data)

        whole = adapter.whole.get(name)
        for first in range(0, entry.rows if whole else 0, step):
            write(first, read_rows(whole, first, min(first + step, entry.rows)).to(dtype))
        for change in changes:
            lora_a, lora_b = adapter.delta(change.path)
            for i in range(0, len(lora_b), step):
                part = lora_b[i : i + step]
                first = change.first + i
                rows = read_rows(entry, first, first + len(part)).double()
                write(first, rows.addmm_(part, lora_a).to(dtype))
