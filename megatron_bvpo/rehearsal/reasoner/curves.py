"""The curves of a training run as a table and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from megatron_bvpo.rehearsal.reasoner.problems import FAMILIES
from megatron_bvpo.rehearsal.reasoner.tokens import MODES


def write_curves(curve: list[dict], folder: Path) -> None:
    """`curves.csv` and `curves.png` in `folder`. A line has `step`, `minutes`, `loss`, and `MODE_FAMILY` shares."""
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, curve[0])
        writer.writeheader()
        writer.writerows({key: round(value, 4) for key, value in line.items()} for line in curve)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [line["step"] for line in curve]
    loss_axis, *mode_axes = figure.subplots(1, 3)
    loss_axis.plot(steps, [line["loss"] for line in curve], color="black")
    loss_axis.set(title="Training loss a token", xlabel="step", yscale="log")
    for axis, mode in zip(mode_axes, MODES, strict=True):
        for family in ("all", *FAMILIES):
            style = dict(color="black", linewidth=2.5) if family == "all" else dict(linewidth=1)
            axis.plot(steps, [line[f"{mode}_{family}"] for line in curve], label=family.replace("_", " "), **style)
        title = {"thinking": "Right with thinking", "empty": "Right behind an empty block"}[mode]
        axis.set(title=title, xlabel="step", ylim=(0, 1))
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)
