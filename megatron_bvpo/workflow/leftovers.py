"""Processes that end with their parent, and those that a stage has left behind, which are found by a variable of their
environment: all that it starts inherits it.

A stage's own process may be killed (`kill -9`, memory) and leave ranks that still write into its folder. Process groups
do not find them, as torchrun gives each rank a session of its own. vLLM's workers write their titles over their
environment: they are found by the engine's log, which they write to.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

VARIABLE = "BVPO_STAGE"
ENGINE_LOG = "engine-log"  # in a stage's folder: the path of what its engine writes to


def ends_with(parent: int, number: int):
    """What a child calls before it becomes another program, so that it is sent `number` when `parent` ends, however:
    prctl(2), Linux only."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        PR_SET_PDEATHSIG = 1  # noqa: N806  (the name in linux/prctl.h)
        libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before this could be asked for
            os._exit(1)

    return ask


def processes_of(folder: Path) -> list[int]:
    """Those of this user on this machine that the stage of `folder` has started, and that still run."""
    marker, found = f"{VARIABLE}={folder}".encode(), []
    note = folder / ENGINE_LOG
    log = note.read_text(encoding="utf-8") if note.exists() else None
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            ours = marker in (entry / "environ").read_bytes().split(b"\0") or log in _written_by(entry)
            if ours and not _is_over(entry):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def note_engine_log(log: Path) -> None:
    """Called by what starts an engine for a stage, before it does."""
    if folder := os.environ.get(VARIABLE):
        (Path(folder) / ENGINE_LOG).write_text(str(log.resolve()), encoding="utf-8")


def _written_by(entry: Path) -> list[str]:
    """Where a process's standard output and errors go."""
    return [os.readlink(entry / "fd" / number) for number in ("1", "2")]


def end_processes_of(folder: Path, grace: float = 15.0) -> int:
    """SIGTERM, and SIGKILL to what is left after `grace` seconds; returns how many there were."""
    first = processes_of(folder)
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        for pid in processes_of(folder):
            _tell(pid, number)
        deadline = time.monotonic() + seconds
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    return len(first)


def _is_over(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _tell(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
