"""What a chain keeps of its stages: OUT/stages/<name>/{log.txt, begun.json, done.json, failed.json, lock, job}.

Locks are flock's, so they go with their process, however it ends. They hold on NFS, too, where its lock service runs;
there a shared one needs a file that is open for reading, and an exclusive one a file that is open for writing.
"""

from __future__ import annotations

import enum
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.workflow.stages import Stage, write_json


class State(enum.StrEnum):
    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    WAITING = "not begun"
    STOPPED = "stopped"


class Record:
    """The files of one stage.

    Attributes:
        folder: OUT/stages/<name>.
    """

    def __init__(self, out: Path, name: str):
        self.folder = out / "stages" / name
        self.log = self.folder / "log.txt"
        self._begun, self._done, self._failed = (self.folder / f"{n}.json" for n in ("begun", "done", "failed"))
        self._lock = self.folder / "lock"
        self.job_file = self.folder / "job"

    def state(self) -> State:
        if self._done.exists():
            return State.DONE
        if is_locked(self._lock):
            return State.RUNNING
        if self._failed.exists():
            return State.FAILED
        return State.STOPPED if self._begun.exists() else State.WAITING

    @property
    def done(self) -> bool:
        return self._done.exists()

    def holder(self) -> int | None:
        """The process that runs the stage, on this machine."""
        found = _read(self._lock)
        return found.get("pid") if is_locked(self._lock) and found.get("host") == socket.gethostname() else None

    @property
    def ended(self) -> float | None:
        """When it was done, in seconds of the epoch."""
        return _read(self._done).get("ended")

    def begun_as(self, kept: str | None) -> dict[str, Any]:
        """`origin` of the stage when it began, and more; empty where it may be asked otherwise: it has not begun, or
        every start of it was refused as a user's mistake, and there is no `kept`."""
        found = _read(self._begun)
        if not self.done and self._was_refused(found) and not (kept and os.path.lexists(kept)):
            return {}
        return found

    def _was_refused(self, begun: dict[str, Any]) -> bool:
        return self.failure().get("code") == 2 and not begun.get("worked")

    @property
    def job(self) -> str | None:
        """The number of the Slurm job that it has submitted."""
        return self.job_file.read_text().strip() if self.job_file.exists() else None

    def failure(self) -> dict[str, Any]:
        return _read(self._failed)

    def times(self) -> tuple[float, float] | None:
        """When it began and ended, in seconds of the epoch."""
        found = _read(self._done)
        return (found["began"], found["ended"]) if found else None

    def take(self, wait) -> IO[str]:
        """The stage's lock, to be held while it runs; `wait` is called once where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return take_lock(self._lock, wait)

    def holds(self, lock: IO[str]) -> bool:
        """Whether `lock` is still this stage's: a user may have removed the folder of one that ran, and begun anew."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), self._lock.stat())
        except FileNotFoundError:
            return False

    def begin(self, stage: Stage, out: Path) -> float:
        now, before = time.time(), _read(self._begun)
        told = {**origin(stage, out), "command": list(stage.command), "began": now}
        # Whether an earlier start may have left something.
        told["worked"] = bool(before) and not self._was_refused(before)
        self._failed.unlink(missing_ok=True)
        write_json(self._begun, told)
        return now

    def end(self, stage: Stage, code: int, began: float) -> None:
        told = {"command": list(stage.command), "code": code, "began": began, "ended": time.time()}
        if code == 0:
            write_json(self._done, told)
        else:
            write_json(self._failed, told | {"last": last_lines(self.log)})


def origin(stage: Stage, out: Path) -> dict[str, Any]:
    """What decides the stage's result: its own settings, and when each stage that it is made from was done."""
    return {"what": stage.what(out), "made_from": {name: Record(out, name).ended for name in stage.after}}


def take_lock(path: Path, wait) -> IO[str]:
    """The file, locked; `wait` is called with what its holder wrote where it is another's, before this waits for it."""
    file = path.open("a+", encoding="utf-8")
    try:
        if not _has_locked(file):
            wait(_read(path))
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
        file.close()
        raise _no_locks(path, e) from None
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _has_locked(file: IO[str]) -> bool:
    """A few tries: whoever looks whether it is locked (is_locked) holds it for a moment."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def is_locked(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as e:
        raise _no_locks(path, e) from None


def _no_locks(path: Path, error: OSError) -> UserError:
    remedy = "give a folder on a disk that has locks (flock)"
    return UserError(f"cannot be locked: {error.strerror}", file=str(path), remedy=remedy)


def last_lines(path: Path, lines: int = 5) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 10_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
