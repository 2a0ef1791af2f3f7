"""The report's arms beside the main ones, and what they say of κ."""

from __future__ import annotations

import numpy as np

from benchmarks.study.cells import IN_MODE, compared, difference, signed, table, verdict
from benchmarks.study.intervals import Estimate, crossed, over_seeds
from benchmarks.study.plan import MORE_ARMS
from benchmarks.study.results import Tables
from megatron_bvpo.evaluation.paired_differences import LEVEL, holm
from megatron_bvpo.rehearsal.reasoner.tokens import MODES

KAPPAS = ("mse-every-step", "auto-every-step")  # κ = 1 and κ = .03, both with a probe in every step


def batch_of(arm: str, batch: int) -> int:
    return 2 * batch if arm == "trace-twice" else batch


def comparisons(tables: Tables, batch: int) -> tuple[list[tuple[str, str, str]], list[Estimate]]:
    """((mode, a, b), …) and a − b: each arm against auto and trace only, and the two κ."""
    there = [arm for arm in MORE_ARMS if len(tables.of(arm, batch_of(arm, batch))) > 1]
    pairs = [(arm, b) for arm in there for b in ("auto", "trace")]
    pairs += [KAPPAS] if set(KAPPAS) <= set(there) else []
    cells = [(mode, a, b) for mode in MODES for a, b in pairs]
    return cells, [difference(tables, (a, batch_of(a, batch)), (b, batch_of(b, batch)), mode) for mode, a, b in cells]


def section(tables: Tables, batch: int) -> list[str]:
    """At the smallest batch."""
    cells, found = comparisons(tables, batch)
    if not cells:
        return []
    lines = []
    for arm in dict.fromkeys(a for _, a, _ in cells):
        runs = tables.of(arm, batch_of(arm, batch))
        path = [tables.steps[run["name"]][-1].get("alpha") for run in runs]
        where = over_seeds(np.array([float(a) for a in path])) if all(path) else None
        right = [crossed(tables.answers(arm, batch_of(arm, batch), mode)) for mode in MODES]
        lines.append([arm, len(runs), *right, f"{where.mean:.2f} ± {where.half:.2f}" if where else "–"])
    return [
        "## Beside the main arms",
        f"At batches of {batch} (`trace-twice`: {2 * batch} trace pairs, as many pairs as α = .5 has; `right-answers`: "
        "imitation of the chosen answers alone; `three-streams`: a tenth of it beside the two pairs). "
        f"`for all` and p are of these {len(cells)} comparisons.",
        table(["arm", "runs", *(f"right {IN_MODE[mode]}, %" for mode in MODES), "last α"], lines),
        compared([(IN_MODE[mode], a, b) for mode, a, b in cells], found),
    ]


def kappa(tables: Tables, batch: int) -> list[str]:
    """The two κ of the same probes, among all comparisons of `section`."""
    cells, found = comparisons(tables, batch)
    corrected = holm([estimate.p for estimate in found])
    mine = [(mode, e, p) for (mode, a, b), e, p in zip(cells, found, corrected, strict=True) if (a, b) == KAPPAS]
    if not mine:
        return ["- **Is κ = .03 right?** No arm here can say."]
    said = "; ".join(
        f"{signed(e)} {IN_MODE[mode]} ({verdict(e, p, 'κ = 1', 'κ = .03', len(found))})" for mode, e, p in mine
    )
    if all(p >= LEVEL for _, _, p in mine):
        said += ". Right answers tell no κ from the other, and docs/alpha.md's bench stays the ground of the default"
    return [
        f"- **Is κ = .03 right?** With a probe in every step at batches of {batch}, κ = 1 (`mse`) less κ = .03: {said}."
    ]
