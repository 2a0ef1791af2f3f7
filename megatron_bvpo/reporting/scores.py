"""Scores of `bvpo eval`, read from every `scores.json` in and below a run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

FILE = "scores.json"
VERSION = 1


@dataclass(frozen=True)
class Score:
    """The score of a run on one data set in one mode. Scores and shares are in per cent.

    Attributes:
        dataset: its title.
        where: the evaluation's folder, below the run's.
        low, high: ends of the 95 % interval.
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

    @property
    def text(self) -> str:
        return f"{self.score:.1f}"

    @property
    def interval(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"

    @property
    def asked(self) -> str:
        return f"{self.questions} × {self.repeats}" if self.repeats > 1 else str(self.questions)


def read_scores(folder: Path) -> tuple[list[Score], list[str]]:
    """Scores of a run, by the names of their folders, and a note for each that could not be had."""
    found, notes = [], []
    files = (folder / FILE, *sorted(folder.glob(f"*/{FILE}")), *sorted(folder.glob(f"*/*/{FILE}")))
    for file in filter(Path.is_file, files):
        where, named = str(file.parent.relative_to(folder)), file.relative_to(folder)
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["version"] != VERSION:
                notes.append(f"{named} has version {told['version']}, expected {VERSION}: left out.")
                continue
            found += [_score(row, where) for row in told["scores"]]
            notes += [_missing(row, where) for row in told["missing"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{named} is damaged, or none of bvpo eval's: left out.")
    return found, notes


def _score(row: dict, where: str) -> Score:
    numbers = {name: 100 * float(row[name]) for name in ("score", "low", "high", "cut_off", "unparsed")}
    if not all(map(math.isfinite, (numbers["score"], numbers["cut_off"], numbers["unparsed"]))):
        raise ValueError("a score that is no number")
    return Score(
        dataset=str(row["title"]),
        mode=str(row["mode"]),
        where=where,
        questions=int(row["questions"]),
        repeats=int(row["repeats"]),
        tokens=None if row["tokens"] is None else float(row["tokens"]),
        **numbers,
    )


def _missing(row: dict, where: str) -> str:
    mode = f", {row['mode']}" if row["mode"] else ""
    return f"{where}: no score of {row['dataset']}{mode}: {row['why']}"
