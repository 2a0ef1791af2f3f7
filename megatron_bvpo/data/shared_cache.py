"""Where the rows of a run are kept once they are read and encoded, whether there is room, and how many cores do it.

`BVPO_DATA_CACHE` names a folder that all nodes of a job see (launch/train.sh: one in the run's folder), so that rank 0
reads and encodes once for all of them, and for the job's next start on other nodes, too. Without it the rows lie in
ms-swift's own cache, which may be each node's own.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_bvpo.errors import UserError

VARIABLE = "BVPO_DATA_CACHE"
# Bytes on disk for a byte of a data file: the rows in one form (of JSON lines 1.17 where rows are short and 1.00 where
# they are long, measured), and the same columns once more with their lengths. What compressed tables take is a guess.
ROOM_FOR_TEXT, ROOM_FOR_TABLES = 2.2, 8.0
# More than this wait for each other's writing.
MOST_PROCESSES = 32
# Seconds in which a file that one node has closed shows up on the others: NFS keeps what it knows of a folder for 30.
VISIBLE_S = 60.0


def is_shared() -> bool:
    """Whether the folder was named, so that all nodes may be expected to see it."""
    return bool(os.environ.get(VARIABLE))


def modelscope_cache() -> Path:
    """As modelscope.hub.utils.utils.get_cache_dir, which is slow to load."""
    given = os.environ.get("MODELSCOPE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "modelscope" / "hub"


def cache_folder() -> Path:
    """The folder of the rows; not made here."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else modelscope_cache() / "datasets" / "bvpo"


def spare_cores() -> int:
    """Processes that rank 0 may start to encode rows: the cores of this process that no waiting rank spins on, up to
    MOST_PROCESSES."""
    waiting = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1
    return max(1, min(len(os.sched_getaffinity(0)) - waiting, MOST_PROCESSES))


def room_for(files: Iterable[str]) -> int:
    """An estimate of the bytes that these data files need in the cache; those that are not there count nothing."""
    found = 0.0
    for path in files:
        tables = path.endswith((".parquet", ".arrow"))
        try:
            found += os.path.getsize(path) * (ROOM_FOR_TABLES if tables else ROOM_FOR_TEXT)
        except OSError:
            continue
    return int(found)


def require_room(folder: Path, needed: float, what: str) -> None:
    """Raises UserError where the disk of `folder` has not `needed` bytes free for `what`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{free / 2**30:.1f} GiB are free, and {what} takes about {needed / 2**30:.1f} GiB",
            file=str(folder),
            remedy=f"Set {VARIABLE} to a folder with room for it, on a disk that all nodes share.",
        )


def all_visible(files: list[str], seconds: float) -> bool:
    """Whether this node sees all the files, after `seconds` at most."""
    deadline = time.monotonic() + seconds
    while True:
        for folder in {os.path.dirname(file) for file in files}:
            try:
                os.listdir(folder)  # makes NFS ask the server again
            except OSError:
                pass
        if all(os.path.exists(file) for file in files):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
