"""The report's second round: from what auto became, on its old pairs once more or on fresh ones."""

from __future__ import annotations

import numpy as np

from benchmarks.study.cells import IN_MODE, compared, difference, number, signed, table, verdict
from benchmarks.study.intervals import Estimate, crossed, over_seeds
from benchmarks.study.plan import SECOND_ROUND
from benchmarks.study.results import Tables
from megatron_bvpo.evaluation.paired_differences import holm
from megatron_bvpo.rehearsal.reasoner.tokens import MODES

STALE, FRESH = SECOND_ROUND
PAIRS = ((FRESH, STALE), (FRESH, "auto"), (STALE, "auto"))
LAST = 5  # steps that a run's last margin is the mean of


def comparisons(tables: Tables, batch: int) -> tuple[list[tuple[str, bool, str, str]], list[Estimate]]:
    """((mode, greedy, a, b), …) and a − b; nothing where two arms have not two seeds in common."""
    cells = [(mode, greedy, a, b) for greedy in (False, True) for mode in MODES for a, b in PAIRS]
    if any(len(tables.differences((a, batch), (b, batch), m, greedy=greedy)) < 2 for m, greedy, a, b in cells):
        return [], []
    return cells, [difference(tables, (a, batch), (b, batch), m, greedy=greedy) for m, greedy, a, b in cells]


def answer(tables: Tables, batch: int) -> list[str]:
    cells, found = comparisons(tables, batch)
    corrected = holm([estimate.p for estimate in found])
    parts = [
        f"{signed(e)} {IN_MODE[mode]}{', greedy,' if greedy else ''} ({verdict(e, p, a, b, len(found))})"
        for (mode, greedy, a, b), e, p in zip(cells, found, corrected, strict=True)
        if (a, b) == (FRESH, STALE)
    ]
    if not parts:
        return []
    return [
        "- **Does a second round want fresh pairs?** Auto at batches of "
        f"{batch} gone on with, fresh pairs less the old ones once more: {'; '.join(parts)}. The old pairs are seen "
        "again and the fresh ones are new: repetition and staleness are one here, as they are for a team."
    ]


def section(tables: Tables, batch: int) -> list[str]:
    cells, found = comparisons(tables, batch)
    if not cells:
        return []
    lines = []
    for arm in ("auto", STALE, FRESH):
        runs = tables.of(arm, batch)
        rows = [float(tables.pairs_of(run)["rows"]) for run in runs]
        paths = [tables.steps[run["name"]] for run in runs]
        margins = [np.mean([float(step["trace_margin"]) for step in path[-LAST:]]) for path in paths]
        lines.append(
            [
                arm,
                len(runs),
                f"{np.mean(rows):.0f}",
                f"{np.mean([batch * int(run['steps']) / n for run, n in zip(runs, rows, strict=True)]):.1f}",
                *(crossed(tables.answers(arm, batch, mode)) for mode in MODES),
                number(over_seeds(np.array(margins))),
                number(over_seeds(np.array([float(path[-1]["alpha"]) for path in paths]))),
            ]
        )
    shared = [float(line["shared"]) / float(line["questions"]) for line in tables.fresh.values()]
    return [
        "## A second round",
        f"From auto's adapters at batches of {batch}, as many steps more at the same rate with an optimizer of their "
        f"own, the model itself as the reference: `{STALE}` on the pairs of the first round once more, in another "
        f"order; `{FRESH}` on pairs that the trained policy answered anew. The same questions were asked, but only "
        "those count that have right and wrong answers in both modes, and a trained policy's are others: "
        f"{100 * np.mean(shared):.0f} % of the fresh pairs' questions are among the old ones'. Fresh pairs come from "
        "the policy at their first step alone. So this is what a team would see that makes new pairs or does not, and "
        f"no measure of b_t by itself. `for all` and p are of these {len(cells)} comparisons.",
        table(
            ["arm", "runs", "rows", "passes", *(f"right {IN_MODE[mode]}, %" for mode in MODES)]
            + [f"margin of the trace pairs, last {LAST} steps", "last α"],
            lines,
        ),
        compared([(f"{IN_MODE[m]}{', greedy' if greedy else ''}", a, b) for m, greedy, a, b in cells], found),
    ]
