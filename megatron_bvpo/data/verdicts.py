"""What is said about rows: the rules of a run, the verdict on one row, and the count over many."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS, ThinkTags
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import DEFAULT, ORDER, TABLE

# Losses of single responses (objective/unpaired.py), and the field that says of a stream's one whether it is right.
UNPAIRED = ("kto", "apo_zero_unpaired")
LABELS = {"trace": "label", "empty": "empty_label"}


@dataclass(frozen=True)
class RowRules:
    """What a run asks of its rows.

    Args:
        empty: `--bvpo_empty`: without own empty answers, 'strip' takes the traces off the row's responses,
            'require' refuses the row, 'own' keeps its other streams.
        streams: the streams that are run, of streams.ORDER.
        tags: the model's think tags.
        unpaired: the loss takes single responses with a label (KTO), no pairs; demonstrations are the same.
        gate_threshold: of HPT's gate (data/gate.py); None: no gate.
        version: of the rules as the code has them. Verdicts are kept on disk by the text of this object.
    """

    empty: Literal["strip", "require", "own"] = "strip"
    streams: tuple[str, ...] = DEFAULT
    tags: ThinkTags = DEFAULT_TAGS
    unpaired: bool = False
    gate_threshold: float | None = None
    version: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        if self.empty not in ("strip", "require", "own"):
            raise UserError(
                f"expected strip, require or own, found {self.empty!r}",
                field="--bvpo_empty",
                remedy="strip uses the pair's answers without their traces; require drops such rows; own trains "
                "their trace pair alone.",
            )
        assert self.streams and set(self.streams) <= set(ORDER), f"unknown streams {self.streams}"
        unlabelled = [name for name in self.streams if self.unpaired and name not in LABELS and TABLE[name].estimates]
        if unlabelled:
            raise UserError(
                f"rows have no label for the stream {unlabelled[0]}, and this --loss_type takes labels",
                field="--bvpo_streams",
                remedy=f"leave {unlabelled[0]} out, or choose a loss of pairs",
            )


@dataclass(frozen=True)
class RowProblem:
    """One thing wrong with a row.

    Args:
        field: where, such as `messages[2].role`.
        problem: what is wrong, in words that do not change from row to row, so that they can be counted.
        remedy: what to do.
        drops: 'row', or the stream that is lost where the row keeps another.
        found: what stood there; for the message only.
        structural: the value has the wrong type. Found in a file, that stops the run.
    """

    field: str
    problem: str
    remedy: str
    drops: str = "row"
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
    """What of a row is used, where its empty answers come from, and what is wrong with it.

    Args:
        streams: those that it has a member of, in their order; none: the row is dropped.
        empty_source: of the empty stream's answers.
        problems: whatever lost the row, or one of its streams.
        many_tags: one of its responses holds an opening or a closing think tag more than once.
        right: of unpaired responses, the streams whose label is true.
        gated: streams that the gate switched off.
    """

    streams: tuple[str, ...] = ()
    empty_source: Literal["own", "stripped"] | None = None
    problems: tuple[RowProblem, ...] = ()
    many_tags: bool = False
    right: tuple[str, ...] | None = None
    gated: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        return bool(self.streams)

    @property
    def trace_ok(self) -> bool:
        return "trace" in self.streams

    @property
    def empty_ok(self) -> bool:
        return "empty" in self.streams

    @property
    def decisive(self) -> RowProblem:
        """The problem that a dropped row is counted under: of several, the first that decides."""
        dropping = [problem for problem in self.problems if problem.drops == "row"]
        return (dropping or self.problems)[0]

    @property
    def lost(self) -> dict[str, RowProblem]:
        """The streams that a kept row has lost, each with the first reason."""
        found: dict[str, RowProblem] = {}
        for problem in self.problems if self.kept else ():
            found.setdefault(problem.drops, problem)
        return found

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @lru_cache(maxsize=4096)  # most rows have the same few
    def from_json(cls, text: str) -> "RowVerdict":
        values: dict[str, Any] = json.loads(text)
        values["problems"] = tuple(RowProblem(**problem) for problem in values["problems"])
        for name in ("streams", "right", "gated"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


def _by_stream() -> dict[str, Counter[str]]:
    return {stream: Counter() for stream in ORDER}


@dataclass
class RowTally:
    """Counts over many rows. A row with several problems is counted under the first that decides.

    Attributes:
        rows: rows that were read.
        members: what each stream has of them.
        own, stripped: where the empty stream's answers come from.
        alone: rows that have this stream and no other, the trace stream apart.
        many_tags: rows with a tag twice or more in a response.
        right: of unpaired responses, those with a true label, by stream; None: there are no such responses.
        gated: what the gate switched off, by stream.
        dropped: rows that were not kept, by reason.
        lost: rows that were kept without one of their streams, by stream and reason.
        remedies: what to do about each reason.
    """

    rows: int = 0
    members: Counter[str] = field(default_factory=Counter)
    own: int = 0
    stripped: int = 0
    alone: Counter[str] = field(default_factory=Counter)
    many_tags: int = 0
    right: Counter[str] | None = None
    gated: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: dict[str, Counter[str]] = field(default_factory=_by_stream)
    remedies: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.rows - self.dropped.total()

    @property
    def trace_pairs(self) -> int:
        return self.members["trace"]

    @property
    def empty_pairs(self) -> int:
        return self.members["empty"]

    def add(self, verdict: RowVerdict) -> None:
        """Counts one row."""
        self.rows += 1
        self.members.update(verdict.streams)
        self.own += verdict.empty_source == "own"
        self.stripped += verdict.empty_source == "stripped"
        if len(verdict.streams) == 1 and not verdict.trace_ok:
            self.alone.update(verdict.streams)
        self.many_tags += verdict.many_tags
        if verdict.right is not None:
            self.right = (self.right or Counter()) + Counter(verdict.right)
        self.gated.update(verdict.gated)
        if not verdict.kept:
            self.dropped[verdict.decisive.reason] += 1
            self.remedies[verdict.decisive.reason] = verdict.decisive.remedy
        for stream, problem in verdict.lost.items():
            self.lost[stream][problem.reason] += 1
            self.remedies[problem.reason] = problem.remedy

    def merge(self, other: "RowTally") -> "RowTally":
        """Adds another count to this one, and returns this one."""
        for name in ("rows", "own", "stripped", "many_tags"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("members", "alone", "gated", "dropped"):
            getattr(self, name).update(getattr(other, name))
        if other.right is not None:
            self.right = (self.right or Counter()) + other.right
        for stream, reasons in other.lost.items():
            self.lost[stream].update(reasons)
        self.remedies |= other.remedies
        return self

    @classmethod
    def from_dict(cls, counts: dict[str, Any]) -> "RowTally":
        """The count that `vars` of one gave, read back from JSON."""
        for name in ("members", "alone", "right", "gated", "dropped"):
            counts[name] = None if counts[name] is None else Counter(counts[name])
        counts["lost"] = {stream: Counter(reasons) for stream, reasons in counts["lost"].items()}
        return cls(**counts)

    def lines(self) -> list[str]:
        """The count for a log."""
        return [
            f"{_count(self.rows, 'row')} read, {self.kept} kept.",
            f"{', '.join(self._members())}.",
            *self._remarks(),
            *_reasons("dropped", self.dropped),
            *(
                line
                for stream in ORDER
                for line in _reasons(f"kept without the {self._noun(stream)}", self.lost[stream])
            ),
        ]

    def empty_line(self) -> str | None:
        """Where the empty stream's answers come from, in shares of the kept rows; None without any row."""
        if not self.kept:
            return None
        absent = self.kept - self.own - self.stripped
        shares = ((self.own, "own answers"), (self.stripped, "stripped ones"), (absent, "none"))
        line = f"empty stream: of {_count(self.kept, 'row')} "
        line += ", ".join(f"{100 * number / self.kept:.0f} % have {what}" for number, what in shares) + "."
        if self.stripped:
            line += (
                " A stripped answer was written behind a trace: another distribution than the paper's, whose answers "
                "without a trace were generated and ranked for themselves."
            )
        return line

    def _noun(self, stream: str) -> str:
        return member_of(stream, unpaired=self.right is not None)

    def _members(self) -> list[str]:
        """What each stream has: always of the trace and the empty stream, of others where there is any."""
        found = []
        for stream in ORDER:
            number = self.members[stream]
            if not number and stream not in DEFAULT:
                continue
            notes = []
            if self.right is not None and stream in LABELS:
                notes.append(f"{self.right[stream]} right, {number - self.right[stream]} wrong")
            if stream == "empty":
                notes.append(f"{self.own} with their own answers, {self.stripped} with stripped answers")
            found.append(_count(number, self._noun(stream)) + (f" ({'; '.join(notes)})" if notes else ""))
        return found

    def _remarks(self) -> list[str]:
        lines = []
        for stream in ORDER:
            if self.alone[stream] and self.alone[stream] < self.kept:
                article = "an" if self._noun(stream)[0] in "aeiou" else "a"
                lines.append(f"{_count(self.alone[stream], 'row')} with {article} {self._noun(stream)} alone.")
        if self.many_tags:
            lines.append(f"{_count(self.many_tags, 'row')} with an opening or closing tag twice or more in a response.")
        off = [_count(self.gated[stream], self._noun(stream)) for stream in ORDER if self.gated[stream]]
        return lines + ([f"Switched off by the gate: {', '.join(off)}."] if off else [])


def member_of(stream: str, unpaired: bool = False) -> str:
    """What a row gives a stream, in words."""
    if not TABLE[stream].estimates:
        return "demonstration" if stream == "expert" else f"{stream} response"
    return f"{stream} {'response' if unpaired else 'pair'}"


def _reasons(title: str, counts: Counter[str]) -> list[str]:
    if not counts:
        return []
    lines = [f"  {number} × {reason}" for reason, number in counts.most_common()]
    return [f"{_count(counts.total(), 'row')} {title}:", *lines]


def require_rows(tally: RowTally, files: Iterable[str], rules: RowRules | None = None) -> None:
    """Refuses data that leave nothing to train on.

    Args:
        tally: the count.
        files: the files or data sets that were read, for the message.
        rules: if given, each stream in use must have a member, too.

    Raises:
        UserError: no row is left, or a stream in use has nothing.
    """
    where = ", ".join(files) or "the data"
    if not tally.kept:
        _refuse(f"no row is left to train on: {tally.rows} read, all dropped", where, tally.dropped, tally.remedies)
    for stream in () if rules is None else rules.streams:
        if not tally.members[stream]:
            what = member_of(stream, rules.unpaired)
            reasons = tally.lost[stream] + Counter({"switched off by the gate": tally.gated[stream]})
            _refuse(f"no {what} is left in {_count(tally.kept, 'row')}", where, reasons, tally.remedies)


def _refuse(message: str, where: str, reasons: Counter[str], remedies: Mapping[str, str]) -> None:
    """With what to do about the commonest reason."""
    remedy = next((remedies[reason] for reason, number in reasons.most_common(1) if number and reason in remedies), "")
    remedy = f"{remedy[0].upper()}{remedy[1:]}. " if remedy else ""
    shown = "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(3))
    raise UserError(
        f"{message}{f' ({shown})' if shown else ''}",
        file=where,
        remedy=f"{remedy}Mend the rows, or check that this is the file you meant.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
