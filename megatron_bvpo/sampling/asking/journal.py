"""Answers on their way to disk: a line for each as it arrives, and whole Parquet shards in place of full journals.

A line is handed to the kernel in the same turn of the loop in which its answer arrived: what the progress counts is
there after a kill. Journal N becomes shard N; a journal whose shard is there is a stop between the shard's renaming
and the journal's removal.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging.judge_items import FAILED_REQUEST
from megatron_bvpo.sampling.samples import (
    JOURNAL,
    JUDGEMENTS,
    SAMPLES,
    Judgement,
    Sample,
    read_journal,
    write_shard,
    writing,
)

# A journal ends at so many bytes or lines: what compacting it holds in memory.
_BYTES = 32 * 2**20
_LINES = 20_000


class FolderLock:
    """Keeps a second `bvpo sample` out of a folder. The kernel lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        with writing(folder / ".lock"):
            self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UserError(
                "another bvpo sample is at work in this folder",
                file=str(folder),
                remedy="wait for it, or give another --out",
            ) from None
        except OSError:
            pass  # a file system without locks

    def release(self) -> None:
        os.close(self._file)


class Journal:
    """The open journal of a folder.

    Args:
        folder: the folder of samples. What earlier processes left in journals is compacted by `compact_left`, first.
        written: called with the samples of each write, when the kernel has them.
        failed: called with the error when a write fails; nothing is written behind a broken line.
    """

    def __init__(
        self,
        folder: Path,
        written: Callable[[list[Sample]], None] = lambda samples: None,
        failed: Callable[[UserError], None] = lambda error: None,
    ) -> None:
        self.folder, self.written, self.failed = folder, written, failed
        (folder / JOURNAL).mkdir(exist_ok=True)
        self._number = last_number(folder)
        self._file: int | None = None
        self._bytes = self._lines = 0
        self._waiting: list[Sample] = []
        self._scheduled = False
        self._compacting: list[asyncio.Future] = []
        self._broken: UserError | None = None

    def add(self, sample: Sample) -> None:
        """Takes an answer; it is written before the loop waits for anything again."""
        self._waiting.append(sample)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Hands what waits to the kernel."""
        self._scheduled = False
        if not self._waiting or self._broken:
            return
        samples, self._waiting = self._waiting, []
        try:
            self._write("".join(sample.to_json() + "\n" for sample in samples).encode())
        except OSError as error:
            self._broken = UserError(
                f"cannot be written: {error.strerror}",
                file=str(self.folder / JOURNAL),
                remedy="make room and give the same command again: it goes on where it was",
            )
            self.failed(self._broken)
            return
        self._lines += len(samples)
        self.written(samples)
        if self._bytes >= _BYTES or self._lines >= _LINES:
            self._rotate()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._open()
        while data:
            done = os.write(self._file, data)
            self._bytes += done
            data = data[done:]

    def _open(self) -> None:
        self._number += 1
        self._path = self.folder / JOURNAL / f"{self._number:06d}.jsonl"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._bytes = self._lines = 0

    def _rotate(self) -> None:
        os.close(self._file)
        self._file = None
        loop = asyncio.get_running_loop()
        self._compacting = [future for future in self._compacting if not future.done() or future.exception()]
        self._compacting.append(loop.run_in_executor(None, compact, self._path))

    async def close(self) -> None:
        """Writes and compacts what is left.

        Raises:
            UserError: a shard cannot be written; its journal stays.
        """
        self.flush()
        if self._file is not None:
            self._rotate()
        await asyncio.gather(*self._compacting)


def compact(journal: Path) -> None:
    """A journal becomes the shard of its number, whole, and goes."""
    shard = shard_of(journal)
    if not shard.exists():
        samples = list({sample.key: sample for sample in read_journal(journal)}.values())
        if samples:
            write_shard(shard, samples, Sample)
    journal.unlink()


def compact_left(folder: Path) -> None:
    """Compacts the journals that earlier processes left.

    Raises:
        UserError: a journal is damaged, or a shard cannot be written.
    """
    for journal in sorted((folder / JOURNAL).glob("*.jsonl")):
        compact(journal)
    for left in (*(folder / SAMPLES).glob(".*"), *folder.glob(".*.parquet.*")):
        left.unlink()


def shard_of(journal: Path) -> Path:
    return journal.parent.parent / SAMPLES / f"{journal.stem}.parquet"


def known_rows(shards: Path, columns: list[str], later_first: bool = False) -> Iterator[dict]:
    """Some columns of all rows of a folder's shards; the texts stay on disk unless they are asked for.

    Raises:
        UserError: a shard is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in sorted(shards.glob("[!.]*.parquet"), reverse=later_first):
        try:
            with pq.ParquetFile(path) as file:
                # Long traces take a hundred kilobytes each.
                for batch in file.iter_batches(512 if "text" in columns else 2048, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"cannot be read: {error}",
                file=str(path),
                remedy="delete it: the same command makes what was in it anew",
            ) from None


def drop_failed(folder: Path) -> int:
    """Takes the records of failed requests out of the shards, so that they are asked again. Returns how many.

    What judges said of them goes first: it would stand in the way of a verdict on the answer that comes.
    """
    for path in sorted((folder / JUDGEMENTS).glob("*/*.parquet")):
        _drop(path, Judgement, lambda row: row["error"] == FAILED_REQUEST)
    shards = sorted((folder / SAMPLES).glob("*.parquet"))
    return sum(_drop(path, Sample, lambda row: row["error"] is not None) for path in shards)


def _drop(shard: Path, kind: type, unwanted: Callable[[dict], bool]) -> int:
    """Writes a shard anew without the unwanted rows, whose `error` decides. Returns how many they were."""
    import pyarrow.parquet as pq

    dropped = sum(map(unwanted, pq.read_table(shard, columns=["error"]).to_pylist()))
    if not dropped:
        return 0
    kept = [row for row in pq.read_table(shard).to_pylist() if not unwanted(row)]
    if kept:
        write_shard(shard, [Sample.from_row(row) if kind is Sample else kind(**row) for row in kept], kind)
    else:
        shard.unlink()
    return dropped


def last_number(folder: Path) -> int:
    """The highest number of a journal or shard."""
    names = [*(folder / JOURNAL).glob("*.jsonl"), *(folder / SAMPLES).glob("*.parquet")]
    return max((int(path.stem) for path in names if path.stem.isdigit()), default=0)
