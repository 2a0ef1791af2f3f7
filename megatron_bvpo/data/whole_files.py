"""Text files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_bvpo.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when all of it is written; after an error there is none.

    Raises:
        UserError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            yield file
        os.replace(aside, path)
    except OSError as error:
        remedy = "choose a folder that can be written and has room"
        raise UserError(f"cannot be written: {error.strerror}", file=str(path), remedy=remedy) from error
    finally:
        aside.unlink(missing_ok=True)


def require_new_file(path: Path, flag: str, overwrite: bool) -> None:
    """Raise UserError where a file of that name cannot be made, or would take the place of one that is there."""
    if path.is_dir():
        raise UserError("is a folder", file=str(path), field=flag, remedy=f"name a file: {path / 'pairs.jsonl'}")
    if path.suffix not in (".jsonl", ".json"):
        remedy = f"call it {path.stem or 'pairs'}.jsonl"
        raise UserError("rows are written as JSON lines", file=str(path), field=flag, remedy=remedy)
    if path.exists() and not overwrite:
        raise UserError("is there already", file=str(path), field=flag, remedy="add --overwrite, or name another file")
    if not path.absolute().parent.is_dir():
        raise UserError("no such folder", file=str(path.parent), field=flag, remedy="make it first")
