"""One picture of the pairs: what became of each mode's prompts, how often it is right, how long the sides are."""

from pathlib import Path

from megatron_bvpo.sampling.pairing.pairs_report import BINS, histogram, lengths
from megatron_bvpo.sampling.pairing.pairs_run import Outcome

_CHOSEN, _REJECTED, _NEUTRAL = "#2a7f62", "#c1553b", "#5b6b7b"


def draw(outcome: Outcome, path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    modes = outcome.modes
    figure, axes = plt.subplots(len(modes), 3, figsize=(14, 3.4 * len(modes)), squeeze=False, layout="constrained")
    for row, mode in zip(axes, modes, strict=True):
        _outcomes(row[0], outcome, mode)
        _rates(row[1], outcome, mode)
        _lengths(row[2], outcome, mode)
    aside = path.with_name(f".{path.name}")
    try:
        figure.savefig(aside, dpi=110, format="png")
        aside.replace(path)
    finally:
        plt.close(figure)
        aside.unlink(missing_ok=True)


def _outcomes(ax, outcome: Outcome, mode: str) -> None:
    reasons = outcome.reasons[mode].most_common(6)
    pairs = len(outcome.facts.prompts) - outcome.reasons[mode].total()
    named = [("a pair", pairs), *reasons][::-1]
    ax.tick_params(axis="y", labelsize=8)
    bars = ax.barh([_wrapped(name) for name, _ in named], [n for _, n in named], color=_NEUTRAL)
    bars[-1].set_color(_CHOSEN)
    ax.bar_label(bars, padding=3)
    ax.margins(x=0.15)
    ax.set_title(f"{mode}: prompts")


def _rates(ax, outcome: Outcome, mode: str) -> None:
    bars = ax.bar(BINS, histogram(outcome.rates[mode]), color=_NEUTRAL)
    ax.bar_label(bars, padding=2)
    ax.margins(y=0.15)
    ax.set_title(f"{mode}: prompts by accept rate")


def _lengths(ax, outcome: Outcome, mode: str) -> None:
    import numpy as np

    found = lengths(outcome.pairs(mode), "tokens") or lengths(outcome.pairs(mode), "characters")
    unit = "tokens" if lengths(outcome.pairs(mode), "tokens") else "characters"
    ax.set_title(f"{mode}: length in {unit}")
    if not found:
        ax.text(0.5, 0.5, "no pair", ha="center", va="center", transform=ax.transAxes)
        return
    chosen, rejected = (np.maximum(side, 1) for side in zip(*found, strict=True))
    longest, shortest = max(chosen.max(), rejected.max()), min(chosen.min(), rejected.min())
    spread = longest > 20 * shortest
    edges = np.geomspace(shortest, longest + 1, 31) if spread else np.linspace(shortest, longest + 1, 31)
    if longest - shortest < 30:  # one bin a length, or some would stay empty
        edges = np.arange(shortest, longest + 2) - 0.5
    for side, name, colour in ((chosen, "chosen", _CHOSEN), (rejected, "rejected", _REJECTED)):
        ax.hist(side, bins=edges, histtype="step", linewidth=1.8, color=colour, label=name)
    if spread:
        ax.set_xscale("log")
    ax.legend(frameon=False)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 38))
