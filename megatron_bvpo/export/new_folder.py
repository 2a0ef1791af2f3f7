"""A folder that appears whole or not at all, and what a model's folder holds beside its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bvpo.errors import UserError

# Of a model's folder, what an engine reads beside the weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".distcp")


def require_free(out: Path, field: str) -> None:
    """Raises UserError where something is there, or no folder to put it in. An empty folder is removed."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} is there already", field=field, remedy="give a new folder")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}", field=field, remedy="make it first")
    if out.is_dir():
        out.rmdir()


def require_room(folder: Path, needed: int, field: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{needed / 2**30:.1f} GiB are to be written and {free / 2**30:.1f} GiB are free",
            file=str(folder),
            field=field,
            remedy="give a folder on another disk",
        )


@contextmanager
def new_folder(out: Path, field: str) -> Iterator[Path]:
    """Give a folder to fill, which becomes `out` in the end.

    Raises:
        UserError: a file cannot be read or written, a disk is full; nothing is left.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, out)
    except OSError as e:
        where = e.filename or out
        raise UserError(f"cannot be read or written: {e.strerror or e}", file=str(where), field=field) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_others(source: Path, out: Path) -> None:
    """What is no weight and not there yet: config, tokenizer, sampling settings, code.

    Raises:
        UserError: a link whose file is not there.
        OSError: a file cannot be read or written.
    """
    ours = ("args.json", "bvpo_state.json", "additional_config.json", "latest_checkpointed_iteration.txt")
    for file in sorted(source.iterdir()):
        skipped = file.name in ours or file.name.startswith(".") or ".safetensors" in file.name
        if skipped or file.is_dir() or file.suffix in _WEIGHTS or (out / file.name).exists():
            continue
        if not file.exists():  # a hub's cache with half a download: a link to what is not there
            raise UserError("is a link to nothing", file=str(file), remedy="download the model again")
        shutil.copy(file, out / file.name)
