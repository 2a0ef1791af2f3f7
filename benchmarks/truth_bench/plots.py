"""The bench's plots, from the rows of its CSV files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, str]
# {(regime, optimizer, rate): {arm: [seeds]}}, from report.regrets.
Regrets = dict[tuple[str, str, str], dict[str, np.ndarray]]


def _column(rows: list[Row], key: str) -> np.ndarray:
    return np.array([float(r[key]) for r in rows])


def alpha_paths(paths: list[Row], regimes: list[Row], out: Path) -> None:
    """One run's alpha with its band in every regime, the middle 95 % of all runs, alpha° and alpha*."""
    names = [r["regime"] for r in regimes]
    columns = 4
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(14, 11), sharex=True, sharey=True)
    for axis, truth in zip(axes.flat, regimes, strict=False):
        rows = [r for r in paths if r["regime"] == truth["regime"]]
        x, alpha, error = (_column(rows, k) for k in ("probe", "alpha", "stderr"))
        axis.fill_between(x, _column(rows, "low"), _column(rows, "high"), color="0.88", label="95 % of runs")
        axis.fill_between(x, alpha - 2 * error, alpha + 2 * error, color="C0", alpha=0.3, label="one run, ± 2 s.e.")
        axis.plot(x, alpha, color="C0", lw=1)
        axis.axhline(float(truth["alpha_circ"]), color="k", lw=1, label="α°")
        axis.axhline(float(truth["alpha_star"]), color="C3", lw=1, ls="--", label="α*")
        axis.set_title(truth["regime"], fontsize=10)
        axis.set_ylim(0, 1)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes.flat[0].legend(fontsize=7, loc="upper right")
    figure.supxlabel("probe")
    figure.supylabel("α (decay 0.9)")
    _save(figure, out)


def gap(rows: list[Row], out: Path) -> None:
    """alpha° and alpha* while the policy leaves its sampler."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, name in enumerate(dict.fromkeys(r["regime"] for r in rows)):
        mine = [r for r in rows if r["regime"] == name]
        axis.plot(_column(mine, "step"), _column(mine, "alpha_circ"), color=f"C{i}", label=f"{name}: α°")
        axis.plot(_column(mine, "step"), _column(mine, "alpha_star"), color=f"C{i}", ls="--", label=f"{name}: α*")
    axis.set(xlabel="steps of exact descent on the trace loss", ylabel="α", ylim=(0, 1.1))
    axis.legend(fontsize=7, ncol=4, loc="upper center")
    _save(figure, out)


def regret_by_kappa(final: Regrets, out: Path) -> None:
    """Mean regret over regimes of each kappa and of the fixed alphas, one line per optimizer and rate."""
    kappas = [0.01, 0.03, 0.1, 0.3, 1.0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    groups = sorted({s[1:] for s in final}, key=lambda g: (g[0] == "adam", float(g[1])))
    for i, group in enumerate(groups):
        label = f"SGD, ηL = {group[1]}" if group[0] == "sgd" else f"Adam, rate {group[1]}"
        style = {"color": f"C{i}", "marker": "o", "ls": "-" if group[0] == "sgd" else "--"}

        def mean(arm: str, group=group) -> float:
            return float(np.mean([v[arm].mean() for s, v in final.items() if s[1:] == group]))

        left.plot(kappas, [mean(f"sgd {k:g}") for k in kappas], label=label, **style)
        fixed = {0.0: "empty", 0.25: "fixed .25", 0.5: "half", 0.75: "fixed .75", 1.0: "trace"}
        right.plot(list(fixed), [mean(a) for a in fixed.values()], label=label, **style)
    left.set(xscale="log", xlabel="κ", ylabel="loss above the best arm, % of its gain", title="auto, criterion sgd")
    right.set(xlabel="α", title="fixed")
    left.set_ylim(0, 40)
    left.legend(fontsize=8)
    _save(figure, out)


def training_curves(rows: list[Row], out: Path) -> None:
    """Marginal loss over training minus that of alpha = 0.5, in four regimes at one learning rate."""
    shown = ["trace", "mse", "sgd 0.3", "sgd 0.1", "sgd 0.03", "oracle"]
    names = [n for n in ("base", "noisy", "tiny-batch", "decisive") if any(r["regime"] == n for r in rows)]
    banded = ("trace", "sgd 0.1")
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        here = [r for r in rows if r["regime"] == name]
        base = _column([r for r in here if r["arm"] == "half"], "loss")
        for i, arm in enumerate(shown):
            mine = [r for r in here if r["arm"] == arm]
            loss, error, step = _column(mine, "loss") - base, _column(mine, "loss_error"), _column(mine, "step")
            axis.plot(step, loss, color=f"C{i}", label=arm + (" (± 2 s.e.)" if arm in banded else ""))
            if arm in banded:
                axis.fill_between(step, loss - 2 * error, loss + 2 * error, color=f"C{i}", alpha=0.12)
        axis.axhline(0, color="k", lw=0.8)
        axis.set(title=f"{name}, ηL = {here[0]['eta_L']}", xlabel="step")
    axes.flat[0].set_ylabel("marginal loss − that of α = 0.5")
    axes.flat[-1].legend(fontsize=7)
    _save(figure, out)


def stream_paths(rows: list[Row], out: Path) -> None:
    """One run's three weights with their bands in every regime, and the weights that they aim at."""
    names, streams = (list(dict.fromkeys(r[key] for r in rows)) for key in ("regime", "stream"))
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(13, 7), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        for i, stream in enumerate(streams):
            mine = [r for r in rows if r["regime"] == name and r["stream"] == stream]
            x, low, high = (_column(mine, k) for k in ("probe", "low", "high"))
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15)
            axis.plot(x, _column(mine, "weight"), color=f"C{i}", label=stream)
            axis.axhline(float(mine[0]["aim"]), color=f"C{i}", ls="--", lw=1)
        axis.set(title=name, ylim=(0, 1))
    axes.flat[0].legend(fontsize=8, title="dashed: the aim", title_fontsize=8)
    figure.supxlabel("probe")
    figure.supylabel("weight and its band (κ = 0.03, decay 0.97)")
    _save(figure, out)


def stream_regret(rows: list[Row], out: Path) -> None:
    """The criterion above the least one by the number of probes, in every regime, at the smallest kappa."""
    kappa = min({r["kappa"] for r in rows}, key=float)
    names = list(dict.fromkeys(r["regime"] for r in rows))
    shown = {"three": "three streams", "clipped": "three, clipped", "two": "two (α)", "two_grams": "two by Grams"}
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(13, 7), sharex=True)
    for axis, name in zip(axes.flat, names, strict=False):
        mine = [r for r in rows if r["regime"] == name and r["kappa"] == kappa]
        x = _column(mine, "probes")
        for i, (key, label) in enumerate(shown.items()):
            y, error = 100 * _column(mine, key), 200 * _column(mine, f"{key}_error")
            axis.errorbar(x, y, yerr=error, color=f"C{i}", marker="o", ms=4, capsize=3, label=label)
        for probes, bound in ((20, 10), (60, 3)):
            axis.plot([probes], [bound], "k_", ms=14, label="wanted" if probes == 20 else None)
        axis.set(title=name, xscale="log", ylim=(0, None))
        axis.set_xticks(x, [f"{v:.0f}" for v in x])
        axis.minorticks_off()
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("equally weighted probes")
    figure.supylabel(f"criterion above the least one, % (κ = {kappa}, ± 2 s.e.)")
    _save(figure, out)


def _save(figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
