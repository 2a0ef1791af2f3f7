"""scores.json: what `bvpo eval` found, and what `bvpo compare` and the report read.

    {"version": 1, "model": …, "suite": …, "settings": {…},
     "scores": [{"dataset": "math_500", "title": "MATH-500", "mode": "thinking", "metric": "acc",
                 "score": .93, "low": .91, "high": .95, "questions": 500, "repeats": 4, "answers": 2000,
                 "tokens": 5120.3, "cut_off": .012, "unparsed": .004, "thinks": null, "failed": 0,
                 "by_question": {"5d41402abc4b2a76": [1.0, 1.0, 0.0, 1.0], …}, "judge": {…}}, …],
     "missing": [{"dataset": "hle", "mode": null, "why": "…"}]}

Scores, shares and intervals are in [0, 1]; tables and sentences show them in points of 100. Questions are named by a
hash of what was asked and the right answer, so that two evaluations can be put side by side without their data.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation.intervals import interval

SCORES = "scores.json"
VERSION = 1


@dataclass(frozen=True)
class Score:
    """One dataset in one mode.

    Attributes:
        dataset: evalscope's name, or the local file's.
        title: for people.
        mode: thinking or empty.
        metric: what a score is: acc, win rate, ….
        score, low, high: the mean over questions, and its 95 % interval.
        questions, repeats, answers: how many; repeats is what was asked for.
        tokens: mean generated tokens of an answer; None where the server tells none.
        cut_off: share of answers that reached the limit.
        unparsed: share of answers without a final answer that could be read.
        thinks: share of empty answers that think although thinking was off; None for thinking.
        failed: answers that could not be had, or not be scored; they are in no other number.
        by_question: the scores of each question's answers.
        judge: what the scores depend on beside the answers (`Judge.settings`).
    """

    dataset: str
    title: str
    mode: str
    metric: str
    score: float
    low: float
    high: float
    questions: int
    repeats: int
    answers: int
    tokens: float | None
    cut_off: float
    unparsed: float
    thinks: float | None
    failed: int
    by_question: dict[str, list[float]] = field(repr=False)
    judge: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, by_question: dict[str, list[float]], **more: Any) -> "Score":
        """With score, interval and counts from the answers' scores."""
        return cls(**interval(list(by_question.values()))._asdict(), by_question=by_question, **more)


@dataclass(frozen=True)
class Missing:
    """A dataset, or a mode of it, that could not be had."""

    dataset: str
    mode: str | None
    why: str


@dataclass(frozen=True)
class Scores:
    """The whole file. `settings` is what the answers depend on beside model and questions."""

    model: str
    suite: str
    settings: dict[str, Any]
    scores: list[Score]
    missing: list[Missing]

    def of(self, dataset: str, mode: str) -> Score | None:
        return next((s for s in self.scores if (s.dataset, s.mode) == (dataset, mode)), None)


def write(folder: Path, scores: Scores) -> Path:
    """Writes DIR/scores.json, whole or not at all."""
    path = folder / SCORES
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({"version": VERSION, **asdict(scores)}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(aside, path)
    return path


def read(where: Path) -> Scores:
    """The scores of a folder, or of the file itself.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    path = where / SCORES if where.is_dir() else where
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        what = "no scores.json: the evaluation has not come to its end" if where.is_dir() else "does not exist"
        raise UserError(what, file=str(where), remedy="bvpo eval writes scores.json at its end") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", file=str(path), remedy="give bvpo eval again") from None
    if not isinstance(found, dict) or "scores" not in found:
        raise UserError("is no file of scores", file=str(path), remedy="give a folder that bvpo eval filled")
    if found.get("version") != VERSION:
        raise UserError(
            f"has version {found.get('version')}, expected {VERSION}", file=str(path), remedy="give bvpo eval again"
        )
    try:
        return Scores(
            model=str(found["model"]),
            suite=str(found["suite"]),
            settings=dict(found["settings"]),
            scores=[_score(row) for row in found["scores"]],
            missing=[Missing(**row) for row in found["missing"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"is damaged: {error!r}", file=str(path), remedy="give bvpo eval again") from None


_NUMBERS = {
    *("score", "low", "high", "questions", "repeats", "answers", "tokens"),
    *("cut_off", "unparsed", "thinks", "failed"),
}
_MAY_LACK = {"tokens", "thinks"}


def _score(row: dict[str, Any]) -> Score:
    score = Score(**row)
    for name in ("dataset", "title", "mode", "metric"):
        if not isinstance(getattr(score, name), str):
            raise ValueError(f"{name} is {getattr(score, name)!r}")
    if not isinstance(score.judge, dict):
        raise ValueError(f"judge of {score.dataset} is {score.judge!r}")
    for name in _NUMBERS:
        value = getattr(score, name)
        if isinstance(value, bool) or not (isinstance(value, int | float) or (value is None and name in _MAY_LACK)):
            raise ValueError(f"{name} of {score.dataset} is {value!r}")
    for scores in score.by_question.values():
        if not isinstance(scores, list) or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
            raise ValueError(f"scores of {score.dataset} are no lists of finite numbers")
    return score


def table(scores: Sequence[Score]) -> list[str]:
    """The scores as lines of a table for the terminal, in points of 100."""
    head = ["dataset", "mode", "score", "95 % interval", "n", "repeats", "tokens", "cut off", "unparsed", "thinks"]
    rows = [head, *(_row(score) for score in scores)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = {0, 1}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [line.rstrip() for line in lines]


def _row(score: Score) -> list[str]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    return [
        score.title,
        score.mode,
        f"{100 * score.score:.1f}",
        f"{100 * score.low:.1f} to {100 * score.high:.1f}",
        str(score.questions),
        str(score.repeats),
        "-" if score.tokens is None else f"{score.tokens:,.0f}",
        share(score.cut_off),
        share(score.unparsed),
        share(score.thinks),
    ]
