"""What a judge said, as a table by mode and the first of its failures."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_bvpo.sampling.judging.judgement_folder import failed
from megatron_bvpo.sampling.samples import MODES, Judgement

FAILURES_SHOWN = 3


@dataclass
class ModeCounts:
    """Counts of one mode. `wrong` holds the unparsed ones, too."""

    right: int = 0
    wrong: int = 0
    unparsed: int = 0
    failed: int = 0
    scores: list[float] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return self.right + self.wrong + self.failed + len(self.scores)


def wilson(right: int, judged: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval that holds a rate with 95 % probability, by Wilson's score; (0, 1) where nothing is known."""
    if not judged:
        return 0.0, 1.0
    rate, square = right / judged, z * z / judged
    middle = (rate + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(rate * (1 - rate) / judged + square / (4 * judged))
    return max(0.0, middle - half), min(1.0, middle + half)


class Summary:
    """Counts judgements as they are added."""

    def __init__(self, judgements: Iterable[Judgement] = ()) -> None:
        self.modes: dict[str, ModeCounts] = {}
        self.errors: Counter[str] = Counter()
        self.failures: list[Judgement] = []
        for said in judgements:
            self.add(said)

    def add(self, said: Judgement) -> None:
        counts = self.modes.setdefault(said.mode, ModeCounts())
        if failed(said):
            counts.failed += 1
            # What is quoted differs from sample to sample, the reason does not.
            self.errors[re.sub(r"'[^']*'", "'…'", said.error or "no reason told")] += 1
            if len(self.failures) < FAILURES_SHOWN:
                self.failures.append(said)
        elif said.right is None:
            counts.scores.append(said.score)
        elif said.right:
            counts.right += 1
        else:
            counts.wrong += 1
            counts.unparsed += said.parsed is None

    def lines(self) -> list[str]:
        """The table, and what failed."""
        rows = [self._row(mode, self.modes[mode]) for mode in sorted(self.modes, key=_order)]
        lines = _table([["mode", "samples", "right", "wrong", "unparsed", "failed", "accept rate (95 %)"], *rows])
        scored = {mode: counts for mode, counts in self.modes.items() if counts.scores}
        if scored:
            lines += _table(
                [
                    ["mode", "scored", "least", "quarter", "median", "three quarters", "greatest", "mean"],
                    *(_score_row(mode, scored[mode].scores) for mode in sorted(scored, key=_order)),
                ]
            )
        if any(counts.unparsed for counts in self.modes.values()):
            lines.append("unparsed: no final answer was found in the text; these count among the wrong ones")
        for error, count in self.errors.most_common(FAILURES_SHOWN):
            lines.append(f"failed, {count} times: {error}")
        for said in self.failures:
            lines.append(f"  e.g. prompt {said.prompt_id}, {said.mode}, number {said.number}: {said.error}")
        return lines

    @staticmethod
    def _row(mode: str, counts: ModeCounts) -> list[str]:
        judged = counts.right + counts.wrong
        low, high = wilson(counts.right, judged)
        rate = f"{counts.right / judged:.3f} ({low:.3f} to {high:.3f})" if judged else "-"
        numbers = (counts.samples, counts.right, counts.wrong, counts.unparsed, counts.failed)
        return [mode, *(str(number) for number in numbers), rate]


def _score_row(mode: str, scores: list[float]) -> list[str]:
    ordered = sorted(scores)
    at = [ordered[round(part * (len(ordered) - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]
    return [mode, str(len(scores)), *(f"{value:.4g}" for value in [*at, sum(scores) / len(scores)])]


def _order(mode: str) -> tuple[int, str]:
    return (MODES.index(mode) if mode in MODES else len(MODES)), mode


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
