"""From the lines of a log to what the page draws: one series a metric, thinned to what a screen can show. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bvpo.reporting.run_log import STREAMS
from megatron_bvpo.reporting.spikes import spikes
from megatron_bvpo.streams import TABLE

MOST_POINTS = 1000  # a chart is about that many pixels wide
BAND = ("alpha/low", "alpha/high")


@dataclass(frozen=True)
class Curve:
    """One line of a chart: the metric's name in the log, and what tells it from its neighbours."""

    key: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart of the page. `stream`: the one that it is of, or "" for all."""

    key: str
    title: str
    curves: tuple[Curve, ...]
    stream: str = ""
    judged: bool = False  # spikes are looked for, and marked
    unit_interval: bool = False
    band: bool = False


def _of_stream(stream: str, prefix: str) -> tuple[Chart, ...]:
    return (
        Chart(f"loss-{stream}", f"Loss, {stream}", (Curve(f"loss/{stream}"),), stream, judged=True),
        Chart(f"margin-{stream}", f"Reward margin, {stream}", (Curve(f"{prefix}rewards/margins"),), stream),
        Chart(
            f"accuracy-{stream}",
            f"Accuracy, {stream}",
            (Curve(f"{prefix}rewards/accuracies"),),
            stream,
            unit_interval=True,
        ),
        Chart(
            f"rewards-{stream}",
            f"Rewards, {stream}",
            (Curve(f"{prefix}rewards/chosen", "chosen"), Curve(f"{prefix}rewards/rejected", "rejected", dashed=True)),
            stream,
        ),
    )


# The streams side by side, as the eye compares them. A chart without data is not shown.
CHARTS: tuple[Chart, ...] = (
    *(chart for pair in zip(*(_of_stream(*stream) for stream in STREAMS), strict=True) for chart in pair),
    Chart("loss-expert", "Loss, expert", (Curve("loss/expert"),), "expert", judged=True),
    Chart("nll-expert", "Negative log-likelihood a token, expert", (Curve("expert/nll_loss"),), "expert"),
    Chart("alpha", "α, the weight of the trace gradient, with its 95 % band", (Curve("alpha"),), "", False, True, True),
    Chart(
        "weights",
        "Weights of the streams",
        tuple(Curve(f"weight/{name}", name, dashed=not stream.estimates) for name, stream in TABLE.items()),
        unit_interval=True,
    ),
    Chart("gradients", "Gradient norm", (Curve("grad_norm"),), judged=True),
)
KEYS = tuple(curve.key for chart in CHARTS for curve in chart.curves)
JUDGED = tuple(curve.key for chart in CHARTS if chart.judged for curve in chart.curves)


def series(lines: Sequence[dict], key: str, prefix: str = "") -> tuple[list[int], list[float]]:
    """Steps, ascending, and values of a metric; of a step that was done again after a resume, the later one.

    Args:
        lines: of `read_log`.
        prefix: `eval_` for evaluations.
    """
    name, found = prefix + key, {}
    for line in lines:
        value = line.get(name)
        if value is None and key == "loss/trace" and f"{prefix}loss/empty" not in line:
            value = line.get(f"{prefix}loss")  # ms-swift's DPO, which has one stream
        if isinstance(value, int | float):
            found[line["step"]] = float(value)
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def thinned(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> tuple[list[int], list]:
    """At most about `most` points: of each run of neighbours the lowest and the highest, so that no spike is lost.

    Values have six digits; what is not a finite number is None, a gap in the line.
    """
    keep = range(len(steps))
    if len(steps) > most:
        width = math.ceil(2 * len(steps) / most)
        chosen = {0, len(steps) - 1}
        for start in range(0, len(steps), width):
            part = range(start, min(start + width, len(steps)))
            finite = [i for i in part if math.isfinite(values[i])]
            chosen |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else {start}
        keep = sorted(chosen)
    return [steps[i] for i in keep], [_short(values[i]) for i in keep]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def drawn(training: Sequence[dict], evaluation: Sequence[dict]) -> dict:
    """All that the page draws of a run, as JSON: `lines[key][kind] = [steps, values]`, with the kinds t (training) and
    h (held out)."""
    lines = {}
    for key in KEYS:
        kinds = {"t": series(training, key), "h": series(evaluation, key, "eval_")}
        if any(steps for steps, _ in kinds.values()):
            lines[key] = {kind: thinned(*found) for kind, found in kinds.items() if found[0]}
    return {"lines": lines, "band": band(training)}


def band(training: Sequence[dict]) -> list[list]:
    """[steps, low edges, high edges] of α's band at its probes; thinned by neighbours, as the edges belong together."""
    (steps, low), high = series(training, BAND[0]), dict(zip(*series(training, BAND[1]), strict=True))
    both = [(step, value, high[step]) for step, value in zip(steps, low, strict=True) if step in high]
    both = both[:: math.ceil(len(both) / MOST_POINTS) or 1]
    return [[s for s, _, _ in both], *([_short(point[edge]) for point in both] for edge in (1, 2))]


def found_spikes(training: Sequence[dict]) -> dict[str, list[int]]:
    """Metric → steps that are spikes, for the metrics that are judged; those without any are left out."""
    found = {key: spikes(*series(training, key)) for key in JUDGED}
    return {key: steps for key, steps in found.items() if steps}


def last(lines: Sequence[dict], key: str, prefix: str = "") -> float | None:
    """The last value of a metric that is a number, None without any."""
    _, values = series(lines, key, prefix)
    return next((value for value in reversed(values) if math.isfinite(value)), None)
