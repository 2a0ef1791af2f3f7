"""The report's first part: the questions of the study, each with its numbers."""

from __future__ import annotations

import numpy as np

from benchmarks.study import second_round, side_arms
from benchmarks.study.cells import IN_MODE, difference, number, signed, verdict
from benchmarks.study.gradient_parts import (
    alpha_shifts,
    bias_means,
    changes,
    last_alphas,
    last_bands,
    moment_ratios,
    squares,
)
from benchmarks.study.intervals import Estimate, crossed, over_seeds
from benchmarks.study.results import Tables
from megatron_bvpo.evaluation.paired_differences import LEVEL, holm
from megatron_bvpo.rehearsal.reasoner.tokens import MODES

COMPARED = (("auto", "half"), ("auto", "trace"), ("half", "trace"), ("empty", "trace"))


def all_comparisons(tables: Tables, batches: list[int]) -> tuple[list[tuple], list[Estimate]]:
    """((batch, mode, a, b), …) and a − b, of the main arms."""
    cells = [(batch, mode, a, b) for batch in batches for mode in MODES for a, b in COMPARED]
    return cells, [difference(tables, (a, batch), (b, batch), mode) for batch, mode, a, b in cells]


def answers(tables: Tables, batches: list[int]) -> list[str]:
    cells, found = all_comparisons(tables, batches)
    corrected = holm([estimate.p for estimate in found])
    told = dict(zip(cells, zip(found, corrected, strict=True), strict=True))

    def said(a: str, b: str) -> str:
        parts = []
        for batch in batches:
            for mode in MODES:
                estimate, p = told[batch, mode, a, b]
                words = verdict(estimate, p, a, b, len(found))
                parts.append(f"{signed(estimate)} {IN_MODE[mode]} at {batch} ({words})")
        return "; ".join(parts)

    lines = [
        f"- **Does anything help?** Less the untrained model, in points: {less_untrained(tables, batches)}.",
        *sharpening(tables, max(batches)),
        f"- **Is auto better than α = .5** (both sets as one)**?** {said('auto', 'half')}.",
        f"- **Than trace only?** {said('auto', 'trace')}.",
        f"- **And α = .5 than trace only?** {said('half', 'trace')}.",
        *variance(tables, batches),
        *side_arms.kappa(tables, min(batches)),
        *b_t(tables),
        *second_round.answer(tables, max(batches)),
        f"- **What follows for the defaults?** {defaults(tables, told)}",
    ]
    return ["## The questions", "\n".join(lines)]


def defaults(tables: Tables, told: dict[tuple, tuple[Estimate, float]]) -> str:
    """What a user should set, as far as this goes."""
    auto = {cell: p for cell, (_, p) in told.items() if cell[2] == "auto" and p < LEVEL}
    if auto:
        where = ", ".join(f"{a} − {b} {IN_MODE[mode]} at {batch}" for batch, mode, a, b in auto)
        return f"Auto differs where this can tell: {where} (above). Weigh it with docs/alpha.md's bench."
    batches = sorted({batch for batch, *_ in told})
    lasts = " and ".join(number(over_seeds(last_alphas(tables, batch))) for batch in batches)
    ends = [last_bands(tables, batch).mean(1) for batch in batches]
    bands = " and ".join(f"[{low:.2f}, {high:.2f}]" for low, high in ends)
    hardly = all(high - low > 0.5 for low, high in ends)
    known = "the band shows that it is hardly measured yet" if hardly else "see the band"
    return (
        f"None changes, and none is shown right. Auto is told from no other arm; α ended at {lasts} with a mean band "
        f"of {bands}: {known}. Where a run is this short, `--bvpo_alpha .5` and trace only cost no probes, and this "
        "study gives no reason against them. Auto stays the default for long runs and for what the bench of "
        "docs/alpha.md shows, an insurance where noise rules; this study is no evidence for it."
    )


def b_t(tables: Tables) -> list[str]:
    if len(tables.bias) < 2:
        return []
    means = bias_means(tables)
    found = squares(means)
    words = ", ".join(f"{name} {number(found[name])}" for name in ("‖b_t‖²", "‖b_e‖²", "‖E g_f‖²"))
    moved = [f"{shift} at κ = {kappa:g}" for kappa, shift in alpha_shifts(means).items()]
    told = f"α would move by {' and '.join(moved)}" if moved else "too little to say how far α would move"
    return [f"- **Is b_t = 0 harmless after a round?** At the trained adapters {words}: {told} (batches of 8)."]


def greedy_difference(tables: Tables, arm: str, batch: int, mode: str) -> Estimate | None:
    """Likeliest tokens, less the untrained model's."""
    runs = [tables.greedy[run["name"], mode] for run in tables.of(arm, batch) if (run["name"], mode) in tables.greedy]
    start = [right for (name, of), right in tables.greedy.items() if name.startswith("untrained") and of == mode]
    return crossed(np.array(runs) - start[0]) if len(runs) > 1 and start else None


def sharpening(tables: Tables, batch: int) -> list[str]:
    parts = []
    for arm in ("trace", "half", "auto"):
        both = [greedy_difference(tables, arm, batch, mode) for mode in MODES]
        if None in both:
            return []
        parts.append(f"{arm} {signed(both[0])} with thinking, {signed(both[1])} without")
    return [
        "- **Has it learnt, or only sharpened?** Answers of the likeliest tokens, less the untrained model's, at "
        f"{batch}: {'; '.join(parts)}. What rises at temperature 1 and not here is a sharper choice among known "
        "answers."
    ]


def less_untrained(tables: Tables, batches: list[int]) -> str:
    parts = []
    for batch in batches:
        for arm in ("trace", "half", "auto"):
            both = [signed(difference(tables, (arm, batch), ("untrained", 0), mode)) for mode in MODES]
            parts.append(f"{arm} at {batch} {both[0]} with thinking and {both[1]} without")
    return "; ".join(parts)


def variance(tables: Tables, batches: list[int]) -> list[str]:
    parts, noise, falls = [], [], []
    for batch in batches:
        ratios = [moment_ratios(tables.steps[line["name"]]) for line in tables.of("auto", batch)]
        half, chosen = (over_seeds(np.array([r[name] for r in ratios])) for name in ("half", "chosen"))
        parts.append(f"α = .5 has {number(half)} of the trace gradient's variance at {batch}, auto {number(chosen)}")
        falls += [e.mean + e.half < 1 for e in (half, chosen)]
        shares = [f"{arm} {number(noise_share(tables, arm, batch))}" for arm in ("trace", "half", "auto")]
        noise.append(f"at {batch} {', '.join(shares)}")
    return [
        "- **Does variance fall as the paper says?** At the same parameters, "
        f"{'yes' if all(falls) else 'it cannot be told everywhere'}: {'; '.join(parts)}. An optimizer that divides by "
        f"the gradient's size feels the ratio, noise in parts of ‖g‖²: {'; '.join(noise)}."
    ]


def noise_share(tables: Tables, arm: str, batch: int) -> Estimate:
    return over_seeds(np.array([changes(tables.steps[run["name"]])["share"] for run in tables.of(arm, batch)]))
