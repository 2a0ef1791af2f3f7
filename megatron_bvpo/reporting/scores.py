"""Scores of `bvpo eval` in and below a run's folder, as a person reads them, and what they say of two runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation import scores_file
from megatron_bvpo.evaluation.comparison import compare
from megatron_bvpo.evaluation.scores_file import SCORES, Scores

ALL_PAIRS = 4  # with more runs than that each is compared with the first


@dataclass(frozen=True)
class Score:
    """The score of a run on one data set in one mode, in points of 100.

    Attributes:
        dataset: its title.
        where: the evaluation's folder, below the run's.
        low, high: ends of the 95 % interval; infinite where one question tells nothing.
        questions, repeats: how many, and how many answers each.
        tokens: mean of an answer, None where the server told none.
        cut_off, unparsed: shares of the answers.
    """

    dataset: str
    mode: str
    where: str
    score: float
    low: float
    high: float
    questions: int
    repeats: int
    tokens: float | None
    cut_off: float
    unparsed: float

    @classmethod
    def of(cls, found: scores_file.Score, where: str) -> Score:
        return cls(
            found.title,
            found.mode,
            where,
            *(100 * value for value in (found.score, found.low, found.high)),
            found.questions,
            found.repeats,
            found.tokens,
            *(100 * value for value in (found.cut_off, found.unparsed)),
        )

    @property
    def text(self) -> str:
        return f"{self.score:.1f}"

    @property
    def interval(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}" if math.isfinite(self.high - self.low) else "no interval"

    @property
    def asked(self) -> str:
        return f"{self.questions} × {self.repeats}" if self.repeats > 1 else str(self.questions)


@dataclass
class Evaluations:
    """What lies in and below a run's folder; `last`, by the folders' names, is the one that a comparison takes."""

    scores: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    last: Scores | None = None


def scores_below(folder: Path) -> list[Path]:
    """Scores in a folder and up to two folders down."""
    files = (folder / SCORES, *sorted(folder.glob(f"*/{SCORES}")), *sorted(folder.glob(f"*/*/{SCORES}")))
    return [file for file in files if file.is_file()]


def read_scores(folder: Path) -> Evaluations:
    """Every evaluation of a run, by the names of their folders, and a note for what could not be had."""
    found = Evaluations()
    for file in scores_below(folder):
        where = str(file.parent.relative_to(folder))
        try:
            whole = scores_file.read(file)
            rows = [Score.of(score, where) for score in whole.scores]
        except (UserError, TypeError) as error:
            told = error.message if isinstance(error, UserError) else "is damaged"
            found.notes.append(f"{file.relative_to(folder)} {told}; left out.")
            continue
        found.scores += rows
        found.last = whole
        for missing in whole.missing:
            mode = f" {missing.mode}" if missing.mode else ""
            found.notes.append(f"{where} has no score of {missing.dataset}{mode}: {missing.why}")
    return found


def verdicts(evaluations: Sequence[tuple[str, Scores]]) -> list[str]:
    """A sentence for each two runs, data set and mode that both have, from the questions that both were asked."""
    baseline = evaluations[0][0] if len(evaluations) > ALL_PAIRS else None
    return [comparison.sentence() for comparison in compare(evaluations, baseline)]
