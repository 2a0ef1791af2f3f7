"""The report's plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.study.intervals import crossed
from benchmarks.study.plan import ARMS
from megatron_bvpo.rehearsal.reasoner.tokens import MODES

if TYPE_CHECKING:
    from benchmarks.study.report import Tables

COLOURS = dict(zip(ARMS, ("#1b6ca8", "#c0392b", "#7f8c8d", "#2e7d32"), strict=True))


def new_figure(columns: int, rows: int = 1, **how):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def accuracy(tables: Tables, batches: list[int], path: Path) -> None:
    """Change from the untrained model: a point a seed, and the mean with its interval."""
    figure, axes = new_figure(len(MODES), sharey=False)
    for axis, mode in zip(axes[0], MODES, strict=True):
        untrained = tables.answers("untrained", 0, mode)
        place, labels = 0, []
        for batch in batches:
            for arm in ARMS:
                change = 100 * (tables.answers(arm, batch, mode) - untrained)
                found = crossed(change)
                axis.plot(np.full(len(change), place) + 0.15, change.mean(1), ".", color=COLOURS[arm], alpha=0.5)
                axis.errorbar([place], [found.mean], [found.half], fmt="o", color=COLOURS[arm], capsize=4)
                labels.append(f"{arm}\n{batch}")
                place += 1
            place += 1
        places = [i + i // len(ARMS) for i in range(len(labels))]
        axis.set_xticks(places, labels, fontsize=8)
        axis.axhline(0, color="black", linewidth=0.8)
        title = {"thinking": "with thinking", "empty": "without thinking"}[mode]
        axis.set(title=f"Right {title}, less the untrained model", ylabel="points")
    figure.savefig(path, dpi=110)


def alpha(tables: Tables, batches: list[int], path: Path) -> None:
    """Each run's α, and the mean band of its probes."""
    figure, axes = new_figure(len(batches), sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        paths = [tables.steps[line["name"]] for line in tables.of("auto", batch)]
        for steps in paths:
            axis.plot(
                [int(s["step"]) for s in steps], [float(s["alpha"]) for s in steps], color=COLOURS["auto"], alpha=0.6
            )
        probes = [int(s["step"]) for s in paths[0] if s.get("low")]
        ends = [
            np.mean([[float(s[end]) for s in steps if s.get(end)] for steps in paths], axis=0)
            for end in ("low", "high")
        ]
        axis.fill_between(probes, *ends, color=COLOURS["auto"], alpha=0.12, label="band, mean of the runs")
        axis.set(title=f"Batches of {batch}", xlabel="step", ylabel="α", ylim=(0, 1))
        axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
