"""The files of a grown model: the old ones with other names in their headers, and one for each new layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bvpo.export.tensor_files import INDEX, SINGLE, TYPES, ModelFiles, read_json
from megatron_bvpo.growth.layer_choice import new_numbers
from megatron_bvpo.growth.layers import LAYER

# What is copied, or written of zeros, at a time.
CHUNK = 16 << 20


@dataclass(frozen=True)
class Table:
    """A safetensors file before it is written.

    Attributes:
        header: its bytes, the length in front included.
        starts, ends: of each tensor's bytes in the file.
        dtypes: of each tensor, in safetensors' names.
        size: of the file.
    """

    header: bytes
    starts: dict[str, int]
    ends: dict[str, int]
    dtypes: dict[str, str]
    size: int


def table(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Table:
    """The table of a file that holds name → (dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + TYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    data = _as_bytes(header)
    offsets = {name: header[name]["data_offsets"] for name in tensors}
    return Table(
        data,
        {name: len(data) + start for name, (start, _) in offsets.items()},
        {name: len(data) + stop for name, (_, stop) in offsets.items()},
        {name: dtype for name, (dtype, _) in tensors.items()},
        len(data) + end,
    )


def _as_bytes(header: dict[str, Any]) -> bytes:
    """With its length, padded as the format's own writer pads it."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class NewFile:
    """A safetensors file whose tensors come one after the other, so that none waits in memory for the others."""

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]):
        self.table = table(tensors)
        self._left = set(tensors)
        self._stream = path.open("wb")
        self._stream.write(self.table.header)

    def write(self, name: str, values: Tensor) -> None:
        """A tensor's values, rounded to its type in the file."""
        self._start(name)
        data = values.to(TYPES[self.table.dtypes[name]]).contiguous()
        self._stream.write(data.view(torch.uint8).numpy().data)

    def write_zeros(self, name: str) -> None:
        left = self._start(name)
        while left:
            left -= self._stream.write(bytes(min(left, CHUNK)))

    def _start(self, name: str) -> int:
        self._left.remove(name)
        self._stream.seek(self.table.starts[name])
        return self.table.ends[name] - self.table.starts[name]

    def close(self) -> None:
        """Raises AssertionError where a tensor was not written."""
        self._stream.close()
        assert not self._left, f"not written: {sorted(self._left)[:3]}"


def renamed(name: str, numbers: dict[int, int]) -> str:
    """The name of an old tensor in the grown model."""
    match = LAYER.fullmatch(name)
    return f"model.layers.{numbers[int(match[1])]}.{match[2]}" if match else name


def copy_renamed(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """A safetensors file with other names; what its tensors hold is the same to the byte."""
    with source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        new.write(_as_bytes({name if name == "__metadata__" else rename(name): e for name, e in header.items()}))
        shutil.copyfileobj(old, new, CHUNK)


@dataclass(frozen=True)
class Shards:
    """The files of a grown model.

    Attributes:
        old: file of the old model → its name.
        new: place of a new layer → the name of its file.
        tensors: place → what that file holds, name → (dtype, shape).
        index: the content of model.safetensors.index.json.
        bytes: of all files, old headers as long as they were.
    """

    old: dict[Path, str]
    new: dict[int, str]
    tensors: dict[int, dict[str, tuple[str, tuple[int, ...]]]]
    index: dict[str, Any]
    bytes: int


def shards_of(model: ModelFiles, places: list[int], layers: int) -> Shards:
    """What will be written: one file for each of the old ones and for each new layer, named as transformers does."""
    old_numbers, new = new_numbers(places, layers)
    total = len(model.files) + len(places)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    old = dict(zip(model.files, names, strict=False))
    of_new = dict(zip(places, names[len(old) :], strict=True))
    where = {renamed(name, old_numbers): old[entry.file] for name, entry in model.entries.items()}
    tensors: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for place in places:
        # The upper neighbour's names and types.
        prefix = f"model.layers.{place + 1}."
        upper = {name.removeprefix(prefix): e for name, e in model.entries.items() if name.startswith(prefix)}
        tensors[place] = {f"model.layers.{new[place]}.{name}": (e.dtype, e.shape) for name, e in upper.items()}
        where |= dict.fromkeys(tensors[place], of_new[place])
    added = {name: entry for held in tensors.values() for name, entry in held.items()}
    count = sum(torch.Size(shape).numel() for _, shape in added.values())
    data = sum(TYPES[dtype].itemsize * torch.Size(shape).numel() for dtype, shape in added.values())
    metadata = read_json(model.folder / INDEX).get("metadata") if model.files[0].name != SINGLE else None
    metadata = dict(metadata) if isinstance(metadata, dict) else {}  # nobody needs it
    metadata["total_size"] = sum(e.end - e.start for e in model.entries.values()) + data
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += count
    index = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
    size = model.bytes() + sum(table(held).size for held in tensors.values())
    return Shards(old, of_new, tensors, index, size)
