"""The safetensors files of a folder as one table: which tensor stands where, without reading a weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bvpo.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its bytes are file[start:end]."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def read_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file in the order of their bytes. Raises UserError where it is not whole."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < file.stat().st_size:
                raise ValueError("its header is cut")
            header = json.loads(stream.read(length))
        found = {
            name: Entry(file, e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for name, e in header.items()
            if name != "__metadata__"
        }
        for name, entry in found.items():
            if entry.dtype in TYPES and entry.end - entry.start != entry.parameters * TYPES[entry.dtype].itemsize:
                raise ValueError(f"{name} has {entry.end - entry.start} bytes, and its shape has others")
        end = max((entry.end for entry in found.values()), default=8 + length)
        if end != file.stat().st_size:
            raise ValueError(f"{file.stat().st_size} bytes where its header tells of {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"is no whole safetensors file: {e}", file=str(file), remedy="copy it again") from None
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file. Raises UserError for what is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as e:
        raise UserError(f"cannot be read: {e}", file=str(file)) from None
    if not isinstance(found, dict):
        raise UserError(f"holds a {type(found).__name__}, expected an object", file=str(file))
    return found


class ModelFiles:
    """A model in Hugging Face's form: its tables of tensors, and its config.

    Args:
        folder: with model.safetensors, or with an index and the files that it names.
        flag: which named the folder, for errors.

    Raises:
        UserError: no such folder, no safetensors or no config.json in it, a file that is missing or cut, an index that
            names what is not there.
    """

    def __init__(self, folder: Path, flag: str):
        self.folder = folder
        self.files = self._files(flag)
        if not (folder / "config.json").is_file():
            raise UserError("holds no config.json", file=str(folder), field=flag, remedy="copy the model again")
        self.config = read_json(folder / "config.json")
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries |= read_entries(file)
        missing = sorted(self._weight_map().keys() - self.entries.keys())
        if missing and self.files != [folder / SINGLE]:
            raise UserError(
                f"names {len(missing)} tensors that no file holds, {missing[0]} for one",
                file=str(folder / INDEX),
                field=flag,
                remedy="copy the model again",
            )

    def _files(self, flag: str) -> list[Path]:
        """As transformers looks for them: a single file goes before an index."""
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        named = self._weight_map()
        if not named:
            raise UserError(
                "holds no safetensors of a model" if self.folder.is_dir() else "there is no such folder",
                file=str(self.folder),
                field=flag,
                remedy="give a local folder with model*.safetensors files",
            )
        files = [self.folder / name for name in sorted(set(named.values()))]
        for file in files:
            if not file.is_file():
                raise UserError("the index names it and it is not there", file=str(file), field=flag)
        return files

    def _weight_map(self) -> dict[str, str]:
        """Tensor → file, of the index; {} without one."""
        found = read_json(self.folder / INDEX).get("weight_map", {})
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise UserError("maps no tensors to files", file=str(self.folder / INDEX), field="weight_map")
        return found

    @property
    def text_config(self) -> dict[str, Any]:
        """Of the language model, where the config has other parts."""
        return self.config.get("text_config") or self.config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def read_rows(entry: Entry, first: int, last: int) -> Tensor:
    """Rows [first, last) of a tensor, seen as [rows, last dimension], in its own type and in memory of its own."""
    width = entry.shape[-1]
    dtype = TYPES[entry.dtype]
    with entry.file.open("rb") as stream:
        stream.seek(entry.start + first * width * dtype.itemsize)
        data = bytearray((last - first) * width * dtype.itemsize)
        if stream.readinto(data) != len(data):
            raise OSError(f"{entry.file} ended early")
    return torch.frombuffer(data, dtype=dtype).view(last - first, width)
