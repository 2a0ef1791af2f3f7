"""What is said about rows: the rules of a run, the verdict on one row, and the count over many."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS, ThinkTags
from megatron_bvpo.errors import UserError

STREAMS = ("trace", "empty")


@dataclass(frozen=True)
class RowRules:
    """What a run asks of its rows.

    Args:
        empty: `--bvpo_empty`: without own empty answers, 'strip' takes the traces off the pair's responses,
            'require' refuses the row, 'own' keeps its trace pair alone.
        streams: the streams that are run, of 'trace' and 'empty'.
        tags: the model's think tags.
        version: of the rules as the code has them. Verdicts are kept on disk by the text of this object.
    """

    empty: Literal["strip", "require", "own"] = "strip"
    streams: tuple[str, ...] = STREAMS
    tags: ThinkTags = DEFAULT_TAGS
    version: int = field(default=3, init=False)

    def __post_init__(self) -> None:
        if self.empty not in ("strip", "require", "own"):
            raise UserError(
                f"expected strip, require or own, found {self.empty!r}",
                field="--bvpo_empty",
                remedy="strip uses the pair's answers without their traces; require drops such rows; own trains "
                "their trace pair alone.",
            )
        assert self.streams and set(self.streams) <= set(STREAMS), f"unknown streams {self.streams}"

    @staticmethod
    def streams_for(alpha: float | str) -> tuple[str, ...]:
        """The streams that have a weight: with α fixed at 1 no empty one, with 0 no trace one."""
        return {1: ("trace",), 0: ("empty",)}.get(alpha, STREAMS)


@dataclass(frozen=True)
class RowProblem:
    """One thing wrong with a row.

    Args:
        field: where, such as `messages[2].role`.
        problem: what is wrong, in words that do not change from row to row, so that they can be counted.
        remedy: what to do.
        drops: 'row', or 'empty' where only the empty pair is lost.
        found: what stood there; for the message only.
        structural: the value has the wrong type. Found in a file, that stops the run.
    """

    field: str
    problem: str
    remedy: str
    drops: Literal["row", "empty"] = "row"
    found: str = ""
    structural: bool = False

    @property
    def what(self) -> str:
        return f"{self.problem}, found {self.found}" if self.found else self.problem

    @property
    def reason(self) -> str:
        """The problem without what is particular to this row."""
        return f"{self.field.split('[')[0]}: {self.problem}"

    def __str__(self) -> str:
        return f"{self.field}: {self.what} ({self.remedy})"


@dataclass(frozen=True)
class RowVerdict:
    """Which pairs of a row are used, where its empty answers come from, and what is wrong with it.

    `many_tags`: one of its responses holds an opening or a closing think tag more than once.
    """

    trace_ok: bool
    empty_ok: bool
    empty_source: Literal["own", "stripped"] | None = None
    problems: tuple[RowProblem, ...] = ()
    many_tags: bool = False

    @property
    def kept(self) -> bool:
        return self.trace_ok or self.empty_ok

    @property
    def decisive(self) -> RowProblem:
        """The problem that a row, or its empty pair, is counted under: of several, the first that decides."""
        dropping = [] if self.kept else [problem for problem in self.problems if problem.drops == "row"]
        return (dropping or self.problems)[0]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @lru_cache(maxsize=4096)  # most rows have the same few
    def from_json(cls, text: str) -> "RowVerdict":
        values: dict[str, Any] = json.loads(text)
        values["problems"] = tuple(RowProblem(**problem) for problem in values["problems"])
        return cls(**values)


@dataclass
class RowTally:
    """Counts over many rows. A row with several problems is counted under the first that decides."""

    rows: int = 0
    trace_pairs: int = 0
    own: int = 0
    stripped: int = 0
    alone: int = 0
    many_tags: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    empty_lost: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    @property
    def empty_pairs(self) -> int:
        return self.own + self.stripped

    def add(self, verdict: RowVerdict) -> None:
        """Counts one row."""
        self.rows += 1
        self.trace_pairs += verdict.trace_ok
        self.own += verdict.empty_source == "own"
        self.stripped += verdict.empty_source == "stripped"
        self.alone += verdict.empty_ok and not verdict.trace_ok
        self.many_tags += verdict.many_tags
        if not verdict.kept:
            self.dropped[verdict.decisive.reason] += 1
        elif verdict.problems:
            self.empty_lost[verdict.decisive.reason] += 1

    def merge(self, other: "RowTally") -> "RowTally":
        """Adds another count to this one, and returns this one."""
        for name in ("rows", "trace_pairs", "own", "stripped", "alone", "many_tags"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        self.empty_lost.update(other.empty_lost)
        return self

    def lines(self) -> list[str]:
        """The count for a log."""
        lines = [f"{_count(self.rows, 'row')} read, {self.kept} kept."]
        lines.append(
            f"{_count(self.trace_pairs, 'trace pair')}, {_count(self.empty_pairs, 'empty pair')} "
            f"({self.own} with their own answers, {self.stripped} with stripped answers)."
        )
        if self.alone and self.trace_pairs:
            lines.append(f"{_count(self.alone, 'row')} with an empty pair alone.")
        if self.many_tags:
            lines.append(f"{_count(self.many_tags, 'row')} with an opening or closing tag twice or more in a response.")
        for title, counts in (("dropped", self.dropped), ("kept without the empty pair", self.empty_lost)):
            if counts:
                lines.append(f"{_count(counts.total(), 'row')} {title}:")
                lines += [f"  {number} × {reason}" for reason, number in counts.most_common()]
        return lines


def require_rows(tally: RowTally, files: Iterable[str], rules: RowRules | None = None) -> None:
    """Refuses data that leave nothing to train on.

    Args:
        tally: the count.
        files: the files or data sets that were read, for the message.
        rules: if given, each stream in use must have a pair, too.

    Raises:
        UserError: no row is left, or a stream in use has no pair.
    """
    where = ", ".join(files) or "the data"
    if not tally.kept:
        _refuse(f"no row is left to train on: {tally.rows} read, all dropped", where, tally.dropped)
    for stream, pairs in (("trace", tally.trace_pairs), ("empty", tally.empty_pairs)):
        if rules is not None and stream in rules.streams and not pairs:
            _refuse(f"no {stream} pair is left in {_count(tally.kept, 'row')}", where, tally.empty_lost)


def _refuse(message: str, where: str, reasons: Counter[str]) -> None:
    shown = "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(3))
    raise UserError(
        f"{message}{f' ({shown})' if shown else ''}",
        file=where,
        remedy="Mend the rows, or check that this is the file you meant.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
