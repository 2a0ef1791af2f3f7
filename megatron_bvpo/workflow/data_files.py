"""The files behind entries of --dataset, found without ms-swift, which takes seconds to load."""

from __future__ import annotations

import os
import re
from typing import Any

from megatron_bvpo.data.scan import READ_HERE, READ_LATER, nearby
from megatron_bvpo.errors import UserError

_COUNT = re.compile(r"(.*)#(\d+)")


def listed(value: Any) -> list[str]:
    """What a flag of several values is given, of a list or of one."""
    return [str(item) for item in value] if isinstance(value, list) else str(value).split() if value else []


def count_of(entry: str) -> int | None:
    """N of `file#N`, which draws as many rows."""
    found = None if os.path.exists(entry) else _COUNT.fullmatch(entry)
    return int(found[2]) if found else None


def data_file(entry: str) -> str | None:
    """The file of an entry, or None: a folder, or a data set of a hub.

    Raises:
        UserError: it looks like a file and is not there.
    """
    path = entry if count_of(entry) is None else _COUNT.fullmatch(entry)[1]
    if os.path.exists(path):
        return path if os.path.isfile(path) else None
    if path.startswith(("/", "./", "../", "~")) or os.path.splitext(path)[1] in READ_HERE + READ_LATER:
        raise UserError("no such file", file=path, remedy=nearby(path))
    return None
