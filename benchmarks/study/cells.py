"""Cells and tables of the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.study.intervals import Estimate, crossed, detectable
from benchmarks.study.results import Tables
from benchmarks.truth_bench.tables import table as of_words
from megatron_bvpo.evaluation.paired_differences import LEVEL, holm

IN_MODE = {"thinking": "with thinking", "empty": "without"}
# A difference that no team would choose by, and that prediction.md calls no help.
ALIKE = 0.02


def difference(tables: Tables, a: tuple[str, int], b: tuple[str, int], mode: str, *, greedy: bool = False) -> Estimate:
    """a − b, seed by seed and question by question."""
    return crossed(tables.differences(a, b, mode, greedy=greedy))


def compared(cells: Sequence[tuple[str, str, str]], found: Sequence[Estimate]) -> str:
    """Differences with what holds for all of them at once.

    Args:
        cells: (where, a, b); `found` is a − b.
    """
    corrected, lines = holm([estimate.p for estimate in found]), []
    for (where, a, b), estimate, p in zip(cells, found, corrected, strict=True):
        told = "–" if estimate.half == 0 else f"{100 * detectable(estimate, len(found)):.1f}"
        both = "–" if estimate.half == 0 else f"± {100 * estimate.among(len(found)):.1f}"
        line = [where, f"{a} − {b}", estimate.seeds, estimate.questions, signed(estimate), both, f"{p:.3f}"]
        lines.append([*line, verdict(estimate, p, a, b, len(found)), told])
    header = ["where", "what", "runs each", "questions", "difference", "for all", "p", "verdict", "could tell"]
    return table(header, lines)


def verdict(estimate: Estimate, p: float, a: str, b: str, comparisons: int) -> str:
    """Which is better; or that they are less than `ALIKE` apart; or neither can be said."""
    if p < LEVEL:
        return f"**{a if estimate.mean > 0 else b} is better**"
    if estimate.half == 0:
        return "the same answers"
    if abs(estimate.mean) + estimate.among(comparisons) < ALIKE:
        return f"less than {100 * ALIKE:.0f} points apart"
    return "cannot tell"


def percent(share: str) -> str:
    return f"{100 * float(share):.1f}"


def signed(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:+.1f} ± {100 * estimate.half:.1f}"


def number(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.half:.2f}"


def ratio(estimate: Estimate) -> str:
    """Of a log: the ratio and its interval."""
    low, middle, high = np.exp([estimate.mean - estimate.half, estimate.mean, estimate.mean + estimate.half])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return of_words(list(header), [[str(cell) for cell in row] for row in rows])
