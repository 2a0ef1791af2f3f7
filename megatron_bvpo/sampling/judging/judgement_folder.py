"""The folder of one judge's judgements: whose they are, which are there, and how more are added.

Shards are written whole and never changed; where two hold the same sample, the later counts. One process at a time
writes.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging.judges import check_name
from megatron_bvpo.sampling.samples import (
    JUDGEMENTS,
    SETTINGS,
    Judgement,
    SampleKey,
    read_judgements,
    write_shard,
    writing,
)

SHARD_ROWS = 4096
SHARD_SECONDS = 30.0


class JudgementFolder:
    """`DIR/judgements/NAME`, held by this process until it is closed; a context manager.

    Args:
        folder: the folder of samples.
        name: the judge's name.
        settings: what its verdicts depend on (`Judge.settings`, and which text was judged).
        replace: drop what is there, and its settings.
        replace_other: the same where it was judged with other settings.
        remedy: what to do about other settings, in the command's own words.

    Raises:
        UserError: the name is none for a folder, another process holds it, or its judgements have other settings.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: dict[str, Any],
        replace: bool = False,
        replace_other: bool = False,
        remedy: str = "give this judge another --name, or judge all anew with --again all",
    ) -> None:
        check_name(name)
        self.samples, self.name = folder, name
        self.path = folder / JUDGEMENTS / name
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._hold()
        self._waiting: list[Judgement] = []
        self._written = time.monotonic()
        try:
            for left in self.path.glob(".*.parquet.*"):
                left.unlink()  # of a process that was killed while it wrote
            if replace or (replace_other and self._shards() and self._differing(settings, remedy)):
                # The settings go last: without shards they say nothing.
                for shard in self._shards():
                    shard.unlink()
            if not self._shards():
                self._write_settings(settings)
            elif told := self._differing(settings, remedy):
                raise UserError(
                    f"judge {name!r} has judged with other settings: {told}", file=str(self.path), remedy=remedy
                )
            self._next = 1 + max((int(shard.stem) for shard in self._shards() if shard.stem.isdigit()), default=-1)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "JudgementFolder":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.flush()
        finally:
            self._lock.close()

    def judged(self, but_failed: bool = False) -> set[SampleKey]:
        """The samples that have a judgement; `but_failed`: without those for which the judge has no verdict."""
        if not self._shards():
            return set()
        return {said.key for said in read_judgements(self.samples, self.name) if not (but_failed and failed(said))}

    def add(self, judgements: Iterable[Judgement]) -> None:
        """Take judgements; they are on disk after `flush`, which comes by itself every so often."""
        self._waiting.extend(judgements)
        if len(self._waiting) >= SHARD_ROWS or time.monotonic() - self._written > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard."""
        if self._waiting:
            write_shard(self.path / f"{self._next:06d}.parquet", self._waiting, Judgement)
            self._next += 1
            self._waiting = []
        self._written = time.monotonic()

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("*.parquet"))

    def _hold(self):
        with writing(self.path):
            lock = open(self.path / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(
                f"another process judges as {self.name!r}",
                file=str(self.path),
                remedy="wait for it, or give this one another --name",
            ) from None
        return lock

    def _write_settings(self, settings: dict[str, Any]) -> None:
        aside = self.path / f".{SETTINGS}.{os.getpid()}"
        with writing(self.path / SETTINGS):
            aside.write_text(json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
            os.replace(aside, self.path / SETTINGS)

    def _differing(self, settings: dict[str, Any], remedy: str) -> str:
        """The settings that are others than those of the judgements, in words; '' where there are none."""
        path = self.path / SETTINGS
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read: {error}", file=str(path), remedy=remedy) from error
        names = [name for name in sorted(found.keys() | settings.keys()) if found.get(name) != settings.get(name)]
        return ", ".join(f"{name} {found.get(name)!r} there and {settings.get(name)!r} now" for name in names)


def failed(said: Judgement) -> bool:
    """Whether the judge has neither a verdict nor a score for an answer."""
    return said.right is None and said.score is None
