"""Which measurements the bench takes, as rows for the CSV tables."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from truth_bench import frozen
from truth_bench.exact import smoothness, truth
from truth_bench.model import Task
from truth_bench.regimes import REGIMES, Regime
from truth_bench.training import Training, arms, few_arms, train

Row = dict[str, object]

DECAYS = (0.9, 0.95, 0.97, 0.99)
WITHIN = 0.03
PLOTTED_ETA_L = 0.3
TRAINED = (
    "base",
    "long",
    "noisy",
    "biased",
    "unbiased",
    "tiny-batch",
    "large-batch",
    "shared",
    "correlated",
    "decisive",
)


@dataclass(frozen=True)
class Size:
    """How much is measured: probes in a pool, runs and probes per run, long-memory runs; steps and seeds; and of the
    judgement on fresh seeds (seed of the task's tables, 0 being every other study's; runs)."""

    pool: int = 40_000
    runs: int = 200
    probes: int = 200
    long_runs: int = 60
    steps: int = 300
    seeds: int = 8
    regimes: tuple[str, ...] = TRAINED
    sgd: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    adam: tuple[float, ...] = (0.01, 0.03)
    fresh: tuple[tuple[int, int], ...] = ((0, 8), (1, 4), (2, 4))
    stream_sgd: tuple[float, ...] = (0.03, 0.3, 1.0)


QUICK = Size(
    pool=4_000,
    runs=40,
    probes=60,
    long_runs=10,
    steps=100,
    seeds=4,
    regimes=("base", "biased"),
    sgd=(0.3,),
    adam=(0.01,),
    fresh=((0, 2), (1, 2)),
    stream_sgd=(0.3,),
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def frozen_rows(size: Size) -> tuple[list[Row], list[Row], list[Row], dict[str, list[Row]]]:
    """(one row per regime, per regime and decay, per regime and kappa, and alpha paths for the plot)."""
    regimes, decays, kappas, paths = [], [], [], {}
    for regime in REGIMES:
        start = time.monotonic()
        pool = frozen.measure_pool(regime, size.pool)
        true, sd = pool.true, pool.one_probe_sd
        suffice = int(np.ceil((1.96 * sd / WITHIN) ** 2))
        rng = np.random.default_rng(4)
        long = frozen.follow(
            pool, pool.runs(rng, size.long_runs, suffice), criterion="mse", moment_decay=1 - 1 / (20 * suffice)
        )
        index = pool.runs(rng, size.runs, size.probes)
        circ = true.alpha_circ
        row: Row = {
            "regime": regime.name,
            "what": regime.what,
            "pairs": regime.pairs,
            "alpha_circ": circ,
            "alpha_star": true.alpha_star,
            "bias_ratio": (true.bias_t_sq / true.bias_e_sq) ** 0.5,
            "noise_ratio": true.V_t / true.V_e,
            "correlation": true.C / (true.V_t * true.V_e) ** 0.5,
            "bias_share": true.bias_e_sq / true.D,
            "worst_z": max(abs(z) for z in pool.unbiased_z()),
            "one_probe_sd": sd,
            "probes_for_003": suffice,
            "long_mean": long.alpha[:, -1].mean(),
            "long_rms": ((long.alpha[:, -1] - circ) ** 2).mean() ** 0.5,
            "long_within": (np.abs(long.alpha[:, -1] - circ) <= WITHIN).mean(),
            "long_within_star": (np.abs(long.alpha[:, -1] - true.alpha_star) <= WITHIN).mean(),
        }
        at_circ = true.mse(circ)
        row |= {
            f"mse_{name}": true.mse(alpha) / at_circ - 1
            for name, alpha in (("trace", 1.0), ("empty", 0.0), ("half", 0.5), ("star", true.alpha_star))
        }
        regimes.append(row)
        for decay in DECAYS:
            path = frozen.follow(pool, index, criterion="mse", moment_decay=decay)
            settled = min(40, size.probes // 2)
            lagged, same = frozen.lag_penalty(pool, path, settled)
            decays.append(
                {
                    "regime": regime.name,
                    "decay": decay,
                    "bias_8": path.alpha[:, 7].mean() - circ,
                    "rms_8": ((path.alpha[:, 7] - circ) ** 2).mean() ** 0.5,
                    "bias": path.alpha[:, settled:].mean() - circ,
                    "rms": ((path.alpha[:, settled:] - circ) ** 2).mean() ** 0.5,
                    "coverage_8_40": frozen.coverage(path, circ, frozen.WARM_UP, settled),
                    "coverage": frozen.coverage(path, circ, frozen.WARM_UP),
                    "mse_8": frozen.mse_excess(pool, path, 8, 8),
                    "mse_8_40": frozen.mse_excess(pool, path, frozen.WARM_UP, settled),
                    "mse": frozen.mse_excess(pool, path, settled),
                    "realised_lagged": lagged,
                    "realised_same_batch": same,
                }
            )
            if decay == DECAYS[0]:
                paths[regime.name] = [
                    {
                        "regime": regime.name,
                        "probe": j + 1,
                        "alpha": path.alpha[0, j],
                        "stderr": path.stderr[0, j],
                        "low": np.quantile(path.alpha[:, j], 0.025),
                        "high": np.quantile(path.alpha[:, j], 0.975),
                    }
                    for j in range(size.probes)
                ]
        kappas += [_kappa_row(pool, index, kappa) for kappa in (0.3, 0.1, 0.03, 0.01)]
        say(f"frozen {regime.name}: {time.monotonic() - start:.0f} s")
    return regimes, decays, kappas, paths


def _kappa_row(pool: frozen.Pool, index: np.ndarray, kappa: float) -> Row:
    """The sgd criterion against its own aim, at the default memory."""
    path, aim = frozen.follow(pool, index, criterion="sgd", kappa=kappa), pool.true.alpha_kappa(kappa)
    settled = path.alpha[:, min(40, index.shape[1] // 2) :]
    return {
        "regime": pool.regime.name,
        "kappa": kappa,
        "alpha_kappa": aim,
        "bias": settled.mean() - aim,
        "rms": ((settled - aim) ** 2).mean() ** 0.5,
        "stderr": path.stderr[:, -1].mean(),
        "coverage": frozen.coverage(path, aim, frozen.WARM_UP),
    }


def settings_of(regime: Regime, size: Size) -> list[tuple[str, float, float]]:
    """(optimizer, learning rate, learning rate * smoothness or nan)."""
    task = Task(regime.task)
    L = smoothness(task, task.theta_ref_P)
    return [("sgd", eta_L / L, eta_L) for eta_L in size.sgd] + [("adam", lr, float("nan")) for lr in size.adam]


def training_rows(size: Size) -> tuple[list[Row], list[Row]]:
    """(one row per regime, setting and arm; loss and alpha along the run)."""
    rows, curves = [], []
    for regime in (r for r in REGIMES if r.name in size.regimes):
        for optimizer, lr, eta_L in settings_of(regime, size):
            start = time.monotonic()
            result = train(regime, arms(), optimizer, lr, size.steps, size.seeds, cosine=optimizer == "adam")
            setting = {"regime": regime.name, "optimizer": optimizer, "lr": lr, "eta_L": eta_L}
            rows += _training_rows(setting, result)
            if eta_L == PLOTTED_ETA_L:
                curves += _curve_rows(setting, result)
            say(f"training {regime.name} {optimizer} {lr:.3g}: {time.monotonic() - start:.0f} s")
    return rows, curves


def fresh_rows(size: Size) -> list[Row]:
    """The criteria on pairs, and on tasks, that had no part in choosing among them."""
    rows = []
    for tables, seeds in size.fresh:
        for regime in (r for r in REGIMES if r.name in size.regimes):
            regime = replace(regime, task=replace(regime.task, seed=tables))
            for optimizer, lr, eta_L in settings_of(regime, size):
                cosine = optimizer == "adam"
                result = train(regime, few_arms(), optimizer, lr, size.steps, seeds, cosine=cosine, seed=1017 + tables)
                setting = {"regime": regime.name, "optimizer": optimizer, "lr": lr, "eta_L": eta_L}
                rows += [{"tables": tables, **row} for row in _training_rows(setting, result)]
            say(f"fresh, tables {tables}: {regime.name}")
    return rows


def _training_rows(setting: Row, result: Training) -> list[Row]:
    final, whole = result.final(), result.loss[..., 1:].mean(-1)
    return [
        {
            **setting,
            "arm": arm.name,
            "alpha": result.alpha[g, :, -1].mean(),
            "start_loss": result.loss[g, 0, 0],
            "final_loss": " ".join(f"{v:.5f}" for v in final[g]),
            "mean_loss": " ".join(f"{v:.5f}" for v in whole[g]),
        }
        for g, arm in enumerate(result.arms)
    ]


def _curve_rows(setting: Row, result: Training) -> list[Row]:
    n = result.loss.shape[1]
    return [
        {
            **setting,
            "arm": arm.name,
            "step": step,
            "loss": result.loss[g, :, e].mean(),
            "loss_error": result.loss[g, :, e].std(ddof=1) / n**0.5,
            "alpha": result.alpha[g, :, e].mean(),
        }
        for g, arm in enumerate(result.arms)
        for e, step in enumerate(result.steps)
        if step % 50 == 0
    ]


def gap_rows(steps: int = 300, every: int = 25) -> list[Row]:
    """How far alpha° leaves alpha* while the trace loss is trained exactly, away from a sampler that stays."""
    rows = []
    for regime in (r for r in REGIMES if r.name in ("base", "large-batch", "biased", "decisive")):
        task = Task(regime.task)
        L = smoothness(task, task.theta_ref_P)
        theta = task.theta_ref_P.copy()
        for step in range(steps + 1):
            exact = truth(task, theta)
            if step % every == 0:
                true = exact.at(regime.pairs)
                rows.append(
                    {
                        "regime": regime.name,
                        "step": step,
                        "loss": float(task.marginal_loss(theta[None])[0]),
                        "bias_ratio": (true.bias_t_sq / true.bias_e_sq) ** 0.5,
                        "alpha_circ": true.alpha_circ,
                        "alpha_star": true.alpha_star,
                        "mse_cost": true.mse(true.alpha_circ) / true.mse(true.alpha_star) - 1,
                    }
                )
            theta = theta - 0.5 / L * exact.mean_t
    return rows
