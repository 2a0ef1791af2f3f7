"""What steps and probes say of the gradients: variances, noise, and what b_t would change."""

from __future__ import annotations

import numpy as np

from benchmarks.study.intervals import Estimate, over_seeds
from benchmarks.study.results import Rows, Tables

APART = "‖b_e − b_t‖²"
SETTLED = 8  # the steps that are probes one after the other, and in which the gradient shrinks


def moment_ratios(steps: Rows) -> dict[str, float]:
    probes = [{k: float(line[k]) for k in ("D", "X", "W", "V_t", "alpha")} for line in steps if line.get("D")]
    v_t = np.array([p["V_t"] for p in probes])
    x, w, d = (np.array([p[name] for p in probes]) for name in ("X", "W", "D"))
    v_e, c = w + v_t - 2 * x, v_t - x
    a = np.array([p["alpha"] for p in probes])

    def mixed(a):
        return (a**2 * v_t + (1 - a) ** 2 * v_e + 2 * a * (1 - a) * c).sum() / v_t.sum()

    return {
        "empty": mixed(0 * a),
        "half": mixed(0 * a + 0.5),
        "chosen": mixed(a),
        "bias": (d - w).sum() / v_t.sum(),
    }


def changes(steps: Rows) -> dict[str, float]:
    """From step to step, once the first steps' shrinking is over."""
    steps = [line for line in steps if int(line["step"]) > min(SETTLED, len(steps) - 2)]
    apart = sum(float(line["apart"]) for line in steps) / 2
    found = {"gradient": apart / len(steps), "share": apart / sum(float(line["square"]) for line in steps)}
    margins = np.array([float(line["trace_margin"]) for line in steps if line.get("trace_margin")])
    if len(margins) > 1:
        found["margin"] = float((np.diff(margins) ** 2).mean() / 2)
    return found


def last_alphas(tables: Tables, batch: int) -> np.ndarray:
    """[runs] of auto: α of the last step."""
    return np.array([float(tables.steps[run["name"]][-1]["alpha"]) for run in tables.of("auto", batch)])


def last_bands(tables: Tables, batch: int) -> np.ndarray:
    """[2, runs] of auto: the ends of the last probe's band."""
    paths = [tables.steps[run["name"]] for run in tables.of("auto", batch)]
    return np.array([[[float(s[end]) for s in path if s.get(end)][-1] for path in paths] for end in ("low", "high")])


def bias_means(tables: Tables) -> list[dict[str, float]]:
    """The numbers of bias.csv, a run each."""
    return [{k: float(v) for k, v in line.items() if k not in ("run", "seed")} for line in tables.bias]


def squares(means: list[dict[str, float]]) -> dict[str, Estimate]:
    """Means over runs of the unbiased products; each may be negative where there is little to find."""
    apart = [m["bt_bt"] - 2 * m["bt_be"] + m["be_be"] for m in means]
    found = {"‖E g_f‖²": "g_f", "‖b_t‖²": "bt_bt", "‖b_e‖²": "be_be", "⟨b_t, b_e⟩": "bt_be"}
    named = {name: over_seeds(np.array([m[key] for m in means])) for name, key in found.items()}
    return named | {APART: over_seeds(np.array(apart))}


def alpha_shifts(means: list[dict[str, float]]) -> dict[float, str]:
    """κ → how far α would move if b_t were known; nothing where the means' distance is not told from 0."""
    apart = squares(means)[APART]
    if apart.mean <= apart.half:
        return {}
    return {kappa: jackknife(means, lambda s, k=kappa: shift(s, k)) for kappa in (1.0, 0.03)}


def shift(s: dict[str, float], kappa: float, batch: int = 8) -> float:
    """α with b_t known, less α with b_t = 0 in its place: both cut to [0, 1]."""
    v_t, v_e, c = (s[name] * s["pairs"] / batch for name in ("v_t", "v_e", "c"))
    w, apart = v_t + v_e - 2 * c, max(s["bt_bt"] - 2 * s["bt_be"] + s["be_be"], 0.0)
    true = (s["be_be"] - s["bt_be"] + kappa * (v_e - c)) / (apart + kappa * w)
    assumed = (apart + kappa * (v_e - c)) / (apart + kappa * w)
    return float(np.clip(true, 0, 1) - np.clip(assumed, 0, 1))


def jackknife(lines: list[dict[str, float]], of) -> str:
    def at(some: list[dict[str, float]]) -> float:
        return of({k: sum(line[k] for line in some) / len(some) for k in some[0]})

    n, whole = len(lines), at(lines)
    left_out = np.array([at(lines[:i] + lines[i + 1 :]) for i in range(n)])
    pseudo = n * whole - (n - 1) * left_out
    half = over_seeds(pseudo).half
    return f"{whole:.2f} ± {half:.2f}"
