"""Several evaluations side by side: paired differences on each dataset and mode, corrected together, in sentences."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from megatron_bvpo.evaluation.paired_differences import LEVEL, Difference, detectable, difference, holm, needed
from megatron_bvpo.evaluation.scores_file import Score, Scores

# Settings that may differ without a word: they do not change what an answer is.
_FREE = {"model", "seed"}
_MANY = 100_000
# All of five signs are alike in one of sixteen flips: no p-value of so few is below .05.
_FEWEST = 6


@dataclass(frozen=True)
class Comparison:
    """B against A on one dataset in one mode.

    Attributes:
        a, b: names of the evaluations.
        title, mode: the dataset's name for people, and the mode.
        found: the paired difference.
        corrected: its p-value, corrected for all comparisons.
        comparisons: how many those are.
        size: the difference that `needs` is about; None: the one that was found.
    """

    a: str
    b: str
    title: str
    mode: str
    found: Difference
    corrected: float = 1.0
    comparisons: int = 1
    size: float | None = None

    @property
    def verdict(self) -> str:
        """The better one's name, or '' where they cannot be told apart."""
        if self.corrected >= LEVEL:
            return ""
        return self.b if self.found.difference > 0 else self.a

    def sentence(self) -> str:
        """The verdict, the difference with its interval, and where there is none what it would take."""
        better, worse = (self.b, self.a) if self.found.difference > 0 else (self.a, self.b)
        # The score's interval lies around the difference of the better and the worse.
        by = f"{100 * abs(self.found.difference):.1f} ± {100 * self.found.half_width:.1f}"
        where = f"on {self.title} {_with(self.mode)}"
        questions = f"{self.found.questions:,} questions"
        if self.found.questions < _FEWEST:
            return f"{self.a} and {self.b} cannot be told apart {where}: {questions} are too few to tell anything."
        sure = f"p {_p(self.corrected)}{self._for()}"
        if self.verdict:
            return f"{better} beats {worse} by {by} {where} ({questions}, {sure})."
        if self.found.difference == 0:
            start = f"{self.a} and {self.b} score the same {where}, ± {100 * self.found.half_width:.1f} ({questions})"
        else:
            start = f"{better} is ahead of {worse} by {by} {where}, but {questions} cannot tell ({sure})"
        return f"{start}. {self.needs()}"

    def needs(self) -> str:
        """What this evaluation can tell, and what it would take to tell the difference."""
        least = f"It tells differences of {100 * detectable(self.found, self.comparisons):.1f} or more"
        size = self.size or abs(self.found.difference)
        if size < 5e-4:
            return f"{least}."
        need = needed(self.found, size, self.comparisons)
        questions = f"{need.questions:,}" if need.questions < _MANY else f"more than {_MANY:,}"
        if need.questions <= self.found.questions:
            return f"{least}."
        if need.repeats is not None:
            repeats = f"or {need.repeats:,} repeats of these"
        elif need.knows_repeats:
            repeats = "and no number of repeats would do"
        else:
            repeats = "whether repeats would do cannot be said from one answer a question"
        return f"{least}; {100 * size:.1f} would take {questions} questions, {repeats}."

    def _for(self) -> str:
        return f", corrected for {self.comparisons} comparisons" if self.comparisons > 1 else ""


def compare(
    evaluations: Sequence[tuple[str, Scores]], baseline: str | None = None, size: float | None = None
) -> list[Comparison]:
    """Every pair of evaluations, or each against the baseline, on every dataset and mode that both have.

    Args:
        evaluations: names with scores.
        baseline: the name of the one that the others are compared with.
        size: the difference, in [0, 1], that what is needed is told for; None: the one found.
    """
    found = []
    for (a, first), (b, second) in combinations(evaluations, 2):
        if baseline is not None and baseline not in (a, b):
            continue
        if b == baseline:
            (a, first), (b, second) = (b, second), (a, first)
        for score in first.scores:
            other = second.of(score.dataset, score.mode)
            if other is None or other.metric != score.metric:
                continue
            if (paired := difference(score.by_question, other.by_question)) is not None:
                found.append(Comparison(a, b, score.title, score.mode, paired, size=size))
    corrected = holm([comparison.found.p_value for comparison in found])
    return [replace(c, corrected=p, comparisons=len(found)) for c, p in zip(found, corrected, strict=True)]


def remarks(evaluations: Sequence[tuple[str, Scores]]) -> list[str]:
    """What stands between the evaluations: settings that differ, and datasets that cannot be compared."""
    lines = []
    for (a, first), (b, second) in combinations(evaluations, 2):
        if told := _differing(first.settings, second.settings, _FREE):
            lines.append(f"{a} and {b} were asked differently: {told}")
        for score in first.scores:
            other = second.of(score.dataset, score.mode)
            if other is None:
                lines.append(f"{b} has no {score.title} {_with(score.mode)}")
            else:
                lines += [f"{a} and {b} on {score.title} {_with(score.mode)}: {p}" for p in _apart(score, other)]
        for score in second.scores:
            if first.of(score.dataset, score.mode) is None:
                lines.append(f"{a} has no {score.title} {_with(score.mode)}")
    return list(dict.fromkeys(lines))


def _apart(a: Score, b: Score) -> Iterator[str]:
    if a.metric != b.metric:
        yield f"not compared, {a.metric} against {b.metric}"
        return
    if told := _differing(a.judge, b.judge):
        yield f"judged differently: {told}"
    common = len(a.by_question.keys() & b.by_question.keys())
    if common < 2:
        yield f"not compared, {common} common questions (other questions, prompts or right answers)"
    elif alone := len(a.by_question.keys() ^ b.by_question.keys()):
        yield f"{alone:,} questions are in one of them only and left out"


def _differing(a: dict[str, Any], b: dict[str, Any], free: Collection[str] = ()) -> str:
    """The settings that differ, in words."""
    names = sorted((a.keys() | b.keys()) - set(free))
    return "; ".join(f"{n} {a.get(n)!r} against {b.get(n)!r}" for n in names if a.get(n) != b.get(n))


def _with(mode: str) -> str:
    return {"thinking": "with thinking", "empty": "without thinking"}.get(mode, f"in mode {mode}")


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 0.9995 else "1"
