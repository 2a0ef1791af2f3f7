"""The tables of a study, read."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.study.plan import ARMS, CHOOSING_SEED, OTHER_LAYOUT
from benchmarks.truth_bench.tables import read as read_lines

Rows = list[dict[str, str]]


class Tables:
    """The tables of a folder.

    Attributes:
        runs: name → line of runs.csv. right, greedy: (name, mode) → [questions] share of the answers that are right.
        sides: (name, mode) → line of sides.csv. families: of the questions.
        steps: name → lines of steps.csv. fresh: name → line of fresh.csv.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = {line["name"]: line for line in read(folder / "runs.csv")}
        self.right = _shares(read(folder / "answers.csv"))
        self.steps: dict[str, Rows] = defaultdict(list)
        for line in read(folder / "steps.csv"):
            self.steps[line["name"]].append(line)
        self.bias, self.pairs = read(folder / "bias.csv"), read(folder / "pairs.csv")
        self.fresh = {line["name"]: line for line in read(folder / "fresh.csv")}
        self.greedy = _shares(read(folder / "greedy.csv"))
        self.sides = {(line["name"], line["mode"]): line for line in read(folder / "sides.csv")}
        self.families = [line["family"] for line in read(folder / "questions.csv")]

    def of(self, arm: str, batch: int) -> Rows:
        """An arm's runs in the order of their seeds; those that chose the rate and the other layout's are left out.

        Raises:
            ValueError: a seed has two runs (of two rates): which was meant cannot be told.
        """
        found = [
            line
            for line in self.runs.values()
            if (line["arm"], int(line["batch"])) == (arm, batch)
            and int(line["seed"]) != CHOOSING_SEED
            and not line["name"].endswith(OTHER_LAYOUT)
        ]
        if len({line["seed"] for line in found}) < len(found):
            raise ValueError(f"{self.folder / 'runs.csv'}: {arm} at batches of {batch} has runs of several rates")
        return sorted(found, key=lambda line: int(line["seed"]))

    def answers(self, arm: str, batch: int, mode: str, *, greedy: bool = False) -> np.ndarray:
        """[seeds, questions]"""
        right = self.greedy if greedy else self.right
        return np.array([right[line["name"], mode] for line in self.of(arm, batch)])

    def differences(self, a: tuple[str, int], b: tuple[str, int], mode: str, *, greedy: bool = False) -> np.ndarray:
        """[seeds, questions] a − b, of the seeds that both have."""
        right = self.greedy if greedy else self.right
        ours, theirs = (
            {line["seed"]: right[line["name"], mode] for line in self.of(*arm) if (line["name"], mode) in right}
            for arm in (a, b)
        )
        return np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def pairs_of(self, run: dict[str, str]) -> dict[str, str]:
        """The line of a run's pairs."""
        return self.fresh.get(run["name"]) or next(line for line in self.pairs if line["seed"] == run["seed"])

    @property
    def batches(self) -> list[int]:
        return sorted({int(line["batch"]) for line in self.runs.values() if line["arm"] in ARMS})


def _shares(lines: Rows) -> dict[tuple[str, str], np.ndarray]:
    return {
        (line["name"], line["mode"]): np.array([int(digit) for digit in line["right"]]) / int(line["repeats"])
        for line in lines
    }


def read(path: Path) -> Rows:
    """No lines where there is no such table yet."""
    return read_lines(path) if path.exists() else []
