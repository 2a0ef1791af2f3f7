"""Scores of `bvpo eval`, read from every `scores.json` below a run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

FILE = "scores.json"


@dataclass(frozen=True)
class Score:
    """The score of a run on one data set in one mode, in per cent.

    Attributes:
        low, high: ends of the 95 % interval, None where it is not known.
        n, repeats: questions, and answers to each.
    """

    dataset: str
    mode: str
    score: float
    low: float | None
    high: float | None
    n: int
    repeats: int

    @property
    def text(self) -> str:
        return f"{self.score:.1f}"

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:.1f} to {self.high:.1f}"

    @property
    def questions(self) -> str:
        return f"{self.n} × {self.repeats}" if self.repeats > 1 else str(self.n)


def read_scores(folder: Path) -> tuple[list[Score], list[str]]:
    """Scores of a run in the order of the files' names, and a note for each file or entry that cannot be used."""
    found, notes = [], []
    return found, notes
