"""Rows of the bench's CSV files, cells and tables of its report, and how much worse than the best an arm trains."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

Row = dict[str, str]
NOT_A_CHOICE = {"oracle"}
RECOMMENDED = "sgd 0.03"


def read(path: Path) -> list[Row]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def num(row: Row, key: str, digits: int = 3) -> str:
    return f"{float(row[key]):.{digits}f}"


def percent(row: Row, key: str) -> str:
    return f"{100 * float(row[key]):+.1f}"


def seeds(row: Row, key: str) -> np.ndarray:
    return np.array([float(v) for v in row[key].split()])


def regrets(rows: list[Row], key: str) -> dict[tuple[str, str, str], dict[str, np.ndarray]]:
    """{(regime, optimizer, rate): {arm: [seeds]}}: loss above the best arm's mean, per cent of what that arm gained."""
    settings: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for r in rows:
        settings[r["regime"], r["optimizer"], r["eta_L"] if r["optimizer"] == "sgd" else r["lr"]][r["arm"]] = r
    out = {}
    for setting, by_arm in settings.items():
        losses = {arm: seeds(r, key) for arm, r in by_arm.items()}
        best = min(v.mean() for arm, v in losses.items() if arm not in NOT_A_CHOICE)
        gain = float(next(iter(by_arm.values()))["start_loss"]) - best
        out[setting] = {arm: 100 * (v - best) / gain for arm, v in losses.items()}
    return out


def mean_and_interval(values: np.ndarray) -> str:
    """Mean over settings [settings, seeds] with a 95 % interval over seeds (paired: all settings at once)."""
    per_seed = values.mean(0)
    spread = 0.0
    if len(per_seed) > 1:
        from scipy.stats import t

        spread = t.ppf(0.975, len(per_seed) - 1) * per_seed.std(ddof=1) / len(per_seed) ** 0.5
    return f"{per_seed.mean():.1f} ± {spread:.1f}"
