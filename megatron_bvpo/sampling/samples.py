"""The folder that `bvpo sample` fills and `bvpo judge` and `bvpo pairs` read: its files, and one row of each.

    DIR/settings.json                    what was asked for; another start with other settings is refused
    DIR/prompts.parquet                  one row a prompt (`Prompt`)
    DIR/journal/*.jsonl                  answers as they arrive, one JSON object a line (`Sample`)
    DIR/samples/*.parquet                the same, compacted: each shard is written aside, then renamed
    DIR/judgements/NAME/*.parquet        what judge NAME says of each sample (`Judgement`)
    DIR/judgements/NAME/settings.json    the judge's specification and options
    DIR/logs/                            of the engines that launch/sample.sbatch started

A sample is named by (prompt_id, mode, number). Where the journal and a shard hold the same sample (a stop between a
shard's renaming and its journal's removal), they are the same answer and count once.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bvpo.errors import UserError

MODES = ("thinking", "empty", "short")
PROMPTS, SETTINGS = "prompts.parquet", "settings.json"
JOURNAL, SAMPLES, JUDGEMENTS, LOGS = "journal", "samples", "judgements", "logs"

# Settings that only some modes have, or that are only known with a tokenizer: null says nothing of the others.
OF_SOME_MODES = ("empty", "short_budget", "chat_template")

# What can be told of a sample beside its text (`Sample.marks`).
TRUNCATED = "truncated"  # the generation limit was reached (finish_reason length)
THINKS = "thinks"  # a trace although thinking was off
NO_TRACE_END = "no_trace_end"  # thinking was on, and the text has no closing tag


class SampleKey(NamedTuple):
    """Names one sample."""

    prompt_id: str
    mode: str
    number: int


class Prompt(NamedTuple):
    """A prompt as it is asked.

    Attributes:
        prompt_id: the row's own `prompt_id` or `id`, else 16 hexadecimal digits of its messages' hash.
        messages: the conversation, which ends in a user turn.
        answer: the right final answer, where the row has one.
        source: `file:line` (counted from 1).
        columns: the row's other columns.
    """

    prompt_id: str
    messages: list[dict[str, Any]]
    answer: str | None
    source: str
    columns: dict[str, Any]


class Sample(NamedTuple):
    """One answer of the model.

    Attributes:
        prompt_id, mode, number: the sample's name; mode is one of `MODES`, number counts from 0.
        text: the whole response, its tags as training wants them whatever the server did with them: for thinking and
            short `<think>\\ntrace\\n</think>\\n\\nanswer`, for empty the answer alone. None: the request failed.
        tokens: generated tokens (for short: of the answer, behind the cut trace).
        prompt_tokens: tokens of the prompt.
        finish_reason: `stop`, `length`, or `error`.
        logprob_sum: Σ log p of the generated tokens; None where the server tells none.
        gradient_norm: √Σ (1 − p)² of them, the stand-in for the norm of the gradient of log p(text).
        seed: the request's seed.
        server: the base address that answered.
        seconds: from the request to its answer.
        marks: what else is to be told (`TRUNCATED`, `THINKS`, `NO_TRACE_END`).
        error: why the request failed for good, in words.
    """

    prompt_id: str
    mode: str
    number: int
    text: str | None
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish_reason: str = "stop"
    logprob_sum: float | None = None
    gradient_norm: float | None = None
    seed: int | None = None
    server: str | None = None
    seconds: float | None = None
    marks: tuple[str, ...] = ()
    error: str | None = None

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.prompt_id, self.mode, self.number)

    def to_json(self) -> str:
        return json.dumps(self._asdict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "Sample":
        return cls.from_row(json.loads(line))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Sample":
        return cls(**{**row, "marks": tuple(row.get("marks") or ())})


class Judgement(NamedTuple):
    """What one judge says of one sample.

    Attributes:
        prompt_id, mode, number: the sample.
        score: higher is better; None where the judge failed or has none.
        right: whether the final answer is right; None where this judge does not say (a reward), or failed.
        parsed: the final answer that was read out of the text; None where none was found.
        error: why there is no verdict: raised, timed out, no text; beside a wrong verdict, why nothing was parsed (a
            response without a final answer).
        seconds: what it took.
    """

    prompt_id: str
    mode: str
    number: int
    score: float | None = None
    right: bool | None = None
    parsed: str | None = None
    error: str | None = None
    seconds: float | None = None

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.prompt_id, self.mode, self.number)


def schema(kind: type):
    """The Arrow schema of a Parquet file of `Prompt`, `Sample` or `Judgement`. Nested values of prompts are JSON."""
    import pyarrow as pa

    types = {
        Prompt: {name: pa.string() for name in Prompt._fields},
        Sample: {
            "prompt_id": pa.string(),
            "mode": pa.string(),
            "number": pa.int32(),
            "text": pa.large_string(),
            "tokens": pa.int32(),
            "prompt_tokens": pa.int32(),
            "finish_reason": pa.string(),
            "logprob_sum": pa.float64(),
            "gradient_norm": pa.float64(),
            "seed": pa.int64(),
            "server": pa.string(),
            "seconds": pa.float64(),
            "marks": pa.list_(pa.string()),
            "error": pa.string(),
        },
        Judgement: {
            "prompt_id": pa.string(),
            "mode": pa.string(),
            "number": pa.int32(),
            "score": pa.float64(),
            "right": pa.bool_(),
            "parsed": pa.string(),
            "error": pa.string(),
            "seconds": pa.float64(),
        },
    }[kind]
    return pa.schema(list(types.items()))


def write_shard(path: Path, rows: Sequence[NamedTuple], kind: type, metadata: dict[str, str] | None = None) -> None:
    """Write rows of one kind as a Parquet file that is there whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = schema(kind)
    columns = {name: [getattr(row, name) for row in rows] for name in wanted.names}
    if kind is Prompt:
        for name in ("messages", "columns"):
            columns[name] = [json.dumps(value, ensure_ascii=False) for value in columns[name]]
    table = pa.table(columns, schema=wanted.with_metadata(metadata) if metadata else wanted)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written is a user's error that names it.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}",
            file=str(path),
            remedy="make room, or mind the permissions, and give the same command again: it goes on where it was",
        ) from None


def _read(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(512):  # long traces take a hundred kilobytes each
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot be read: {error}", file=str(path), remedy="restore it, or make the folder anew"
        ) from error


def read_prompts(folder: Path) -> Iterator[Prompt]:
    """The prompts of a folder of samples, in their order.

    Raises:
        UserError: the folder is none that `bvpo sample` made, or a file of it is damaged.
    """
    path = folder / PROMPTS
    if not path.is_file():
        raise UserError(
            "no folder of samples: prompts.parquet is missing", file=str(folder), remedy="bvpo sample makes one"
        )
    for row in _read(path):
        yield Prompt(**{**row, "messages": json.loads(row["messages"]), "columns": json.loads(row["columns"])})


def read_samples(folder: Path) -> Iterator[Sample]:
    """Every sample of a folder once, compacted or not. A line that a kill cut short at a journal's end is no sample."""
    seen: set[SampleKey] = set()
    for sample in stored_samples(folder):
        if sample.key not in seen:
            seen.add(sample.key)
            yield sample


def stored_samples(folder: Path) -> Iterator[Sample]:
    """As `read_samples`, and in its memory none: a sample that both shard and journal hold comes twice.

    `bvpo sample` may be at work: a journal that is gone by the time it is read has become a shard, and the shards are
    looked for when the journals are read.
    """
    for path in sorted((folder / JOURNAL).glob("*.jsonl")):
        try:
            yield from read_journal(path)
        except FileNotFoundError:
            pass
    for path in sorted((folder / SAMPLES).glob("*.parquet")):
        yield from map(Sample.from_row, _read(path))


def read_journal(path: Path) -> Iterator[Sample]:
    """The whole lines of a journal.

    Raises:
        UserError: a line before the last is damaged.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield Sample.from_json(line)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"a damaged line: {error}", file=str(path), line=number, remedy="delete the line; it is asked for again"
            ) from error


def judges(folder: Path) -> list[str]:
    """Names of the judges that have judged a folder."""
    return sorted(path.name for path in (folder / JUDGEMENTS).glob("*") if path.is_dir())


def read_judgements(folder: Path, judge: str) -> Iterator[Judgement]:
    """What one judge said; where it judged a sample twice, the later word counts.

    Raises:
        UserError: that judge has not judged this folder.
    """
    yield from {judgement.key: judgement for judgement in stored_judgements(folder, judge)}.values()


def stored_judgements(folder: Path, judge: str) -> Iterator[Judgement]:
    """As `read_judgements`, and in its memory none: an earlier word about a sample comes before the later one."""
    shards = sorted((folder / JUDGEMENTS / judge).glob("*.parquet"))
    if not shards:
        have = ", ".join(judges(folder)) or "none"
        raise UserError(
            f"judge {judge!r} has not judged this folder (there: {have})", file=str(folder), remedy="bvpo judge does"
        )
    for path in shards:
        for row in _read(path):
            yield Judgement(**row)
