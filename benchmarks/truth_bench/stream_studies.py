"""The third, shortened stream: six regimes, the estimator on a policy that stands still, and training. Rows for CSV."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from megatron_bvpo.gradients.simplex import simplex_minimum
from truth_bench.exact import smoothness
from truth_bench.model import Array, Task, TaskConfig
from truth_bench.regimes import BASE, Regime, policy
from truth_bench.stream_training import ByGrams, NotMovedUp, TwoByAlpha, train_streams
from truth_bench.streams import (
    STREAMS,
    StreamsTruth,
    gram_triangles,
    half_gradients,
    sample_short,
    streams_truth,
)
from truth_bench.studies import Row, Size, say

# Short traces have one letter of three, and two of four.
SIX = (
    Regime("base", "one letter of three", BASE),
    Regime("noisy", "two letters of four, drawn almost uniformly", TaskConfig(length=4, trace_scale=0.2, short=2)),
    Regime("biased", "empty stream far off, short one half as far", TaskConfig(empty_offset=1.0)),
    Regime("large-batch", "64 pairs", BASE, pairs=64),
    Regime("shared", "same answers; a short trace begins a trace", TaskConfig(empty_answers="strip", length=2)),
    Regime("decisive", "the trace decides the answer", TaskConfig(trace_effect=3.0, empty_offset=1.0), pairs=32),
)
KAPPAS = (1.0, 0.1, 0.03)
RECOMMENDED = 0.03
PROBES = (20, 60, 200)
ALIKE = 1 - 1e-6  # a memory in which all probes count alike
POOL_SEED, TRAINING_SEED = 41, 2041
EVERY = 8  # from the 8th probe on, as in studies.py


@dataclass(frozen=True)
class StreamPool:
    """M probes' triangles of C and D [M, 9], and the truth."""

    regime: Regime
    true: StreamsTruth
    triangles: Array

    def worst_z(self) -> float:
        """How many standard errors the pool's mean of any number is off the enumerated truth."""
        C = self.true.one_row_kk / self.regime.pairs
        b = self.true.mean_kP - self.true.mean_kP[0]
        D = b @ b.T + C - C[:1] - C[:, :1] + C[0, 0]
        right = np.concatenate([C[np.triu_indices(3)], D[1:, 1:][np.triu_indices(2)]])
        error = self.triangles.std(0) / len(self.triangles) ** 0.5
        return float(np.abs((self.triangles.mean(0) - right) / error).max())


def measure(regime: Regime, size: int, chunk: int = 16384) -> StreamPool:
    task = Task(regime.task)
    short, theta = task.shortened(), policy(regime, task)
    rng, found = np.random.default_rng(POOL_SEED), []
    step = max(chunk // regime.pairs, 1)
    for start in range(0, size, step):
        batch = task.sample(rng, min(step, size - start), regime.pairs)
        brief = sample_short(task, short, rng, batch)
        g = half_gradients(task, short, theta[None], batch, brief, regime.n_first)
        found.append(gram_triangles(g, regime.n_first, regime.pairs))
    return StreamPool(regime, streams_truth(task, short, theta), np.concatenate(found))


def rows(size: Size) -> dict[str, list[Row]]:
    """Tables by name: the truth, the criterion with so many probes, coverage, and one run for the plot."""
    found: dict[str, list[Row]] = {name: [] for name in ("streams", "stream_regret", "stream_bands", "stream_paths")}
    for regime in SIX:
        start = time.monotonic()
        pool = measure(regime, size.pool // 2)
        found["streams"].append(_truth_row(pool))
        for kappa in KAPPAS:
            found["stream_regret"] += _regret_rows(pool, kappa, size.runs if kappa == RECOMMENDED else size.runs // 2)
        for decay in (0.9, 0.97):
            for kappa in (1.0, 0.03):
                found["stream_bands"].append(_band_row(pool, decay, kappa, size.long_runs))
        found["stream_paths"] += _path_rows(pool, 0.03)
        say(f"streams {regime.name}: {time.monotonic() - start:.0f} s")
    return found


def _truth_row(pool: StreamPool) -> Row:
    n, true = pool.regime.pairs, pool.true
    bias = true.mean_kP - true.mean_kP[0]
    row: Row = {"regime": pool.regime.name, "what": pool.regime.what, "pairs": n, "worst_z": pool.worst_z()}
    row["trace_bias"] = float(np.linalg.norm(true.mean_kP[0] - true.mu_P) / np.linalg.norm(bias[1]))
    for j, s in enumerate(STREAMS):
        row |= {f"V_{s}": true.one_row_kk[j, j] / n, f"b_{s}": float(bias[j] @ bias[j])}
    for kappa in KAPPAS:
        M = true.criterion_matrix(n, kappa)
        best, two = (simplex_minimum(m[None])[0] for m in (M, M[:2, :2]))
        least = best @ M @ best
        row |= {f"w_{s}_{kappa:g}": v for s, v in zip(STREAMS, best, strict=True)}
        row |= {f"two_{kappa:g}": two @ M[:2, :2] @ two / least - 1, f"trace_{kappa:g}": M[0, 0] / least - 1}
    return row


def _regret_rows(pool: StreamPool, kappa: float, runs: int) -> list[Row]:
    """The true criterion of the estimated weights over the least one, minus 1, with equally weighted probes."""
    M = pool.true.criterion_matrix(pool.regime.pairs, kappa)
    aim = simplex_minimum(pool.true.criterion_matrix(pool.regime.pairs, kappa, centred=True)[None])[0]
    best = simplex_minimum(M[None])[0]
    settings = {"criterion": "sgd", "kappa": kappa, "moment_decay": ALIKE}
    rng, found = np.random.default_rng(6), []
    for probes in PROBES:
        index = rng.integers(len(pool.triangles), size=(runs, probes))
        row: Row = {"regime": pool.regime.name, "kappa": kappa, "probes": probes}
        makers = {
            "three": lambda: ByGrams(**settings),
            "clipped": lambda: ByGrams(kind=NotMovedUp, **settings),
            "two": lambda: TwoByAlpha(**settings),
            "two_grams": lambda: ByGrams(("trace", "empty"), **settings),
        }
        for name, make in makers.items():
            regret, inside = [], []
            for run in index:
                chooser = make()
                for triangles in pool.triangles[run]:
                    chooser.update(triangles)
                w = chooser.weights()
                regret.append(w @ M @ w / (best @ M @ best) - 1)
                if name == "three":
                    inside.append(_inside(chooser, aim))
            row[name] = float(np.mean(regret))
            row[f"{name}_error"] = float(np.std(regret) / runs**0.5)
            if inside:
                row |= {f"covered_{s}": v for s, v in zip(STREAMS, np.mean(inside, 0), strict=True)}
        found.append(row)
    return found


def _inside(chooser: ByGrams, aim: Array) -> list[bool]:
    bands = chooser.estimator.bands
    return [bands[s][0] - 1e-9 <= v <= bands[s][1] + 1e-9 for s, v in zip(STREAMS, aim, strict=True)]


def _band_row(pool: StreamPool, decay: float, kappa: float, runs: int, probes: int = 60) -> Row:
    """Share of (run, every 8th probe) where the aim lies in the band, and how wide it is."""
    aim = simplex_minimum(pool.true.criterion_matrix(pool.regime.pairs, kappa, centred=True)[None])[0]
    rng, inside, widths = np.random.default_rng(7), [], []
    for run in rng.integers(len(pool.triangles), size=(runs, probes)):
        chooser = ByGrams(criterion="sgd", kappa=kappa, moment_decay=decay)
        for i, triangles in enumerate(pool.triangles[run], 1):
            chooser.update(triangles)
            if i % EVERY == 0:
                inside.append(_inside(chooser, aim))
                widths.append([high - low for low, high in chooser.estimator.bands.values()])
    row: Row = {"regime": pool.regime.name, "decay": decay, "kappa": kappa, "covered": float(np.mean(inside))}
    for s, covered, width in zip(STREAMS, np.mean(inside, 0), np.mean(widths, 0), strict=True):
        row |= {f"covered_{s}": covered, f"width_{s}": width}
    return row


def _path_rows(pool: StreamPool, kappa: float, probes: int = 100) -> list[Row]:
    aim = simplex_minimum(pool.true.criterion_matrix(pool.regime.pairs, kappa, centred=True)[None])[0]
    chooser, found = ByGrams(criterion="sgd", kappa=kappa, moment_decay=0.97), []
    for i, triangles in enumerate(pool.triangles[:probes], 1):
        chooser.update(triangles)
        for s, w, right in zip(STREAMS, chooser.weights(), aim, strict=True):
            low, high = chooser.estimator.bands[s]
            row = {"regime": pool.regime.name, "probe": i, "stream": s, "weight": w, "low": low, "high": high}
            found.append(row | {"aim": right})
    return found


def training_rows(size: Size) -> list[Row]:
    """One row per regime, setting and arm."""
    found: list[Row] = []
    six = [r for r in SIX if r.name in size.regimes] if len(size.regimes) < len(SIX) else SIX
    for regime in six:
        start = time.monotonic()
        task = Task(regime.task)
        L = smoothness(task, task.theta_ref_P)
        settings = [("sgd", e / L, e) for e in size.stream_sgd] + [("adam", size.adam[0], float("nan"))]
        for optimizer, lr, eta_L in settings:
            result = train_streams(regime, optimizer, lr, size.steps, size.seeds, seed=TRAINING_SEED)
            for g, arm in enumerate(result.arms):
                row: Row = {"regime": regime.name, "optimizer": optimizer, "lr": lr, "eta_L": eta_L, "arm": arm.name}
                row |= {"start_loss": result.start, "final_loss": " ".join(f"{v:.5f}" for v in result.final[g])}
                weights = result.weights[g].mean(0)
                found.append(row | {f"w_{s}": v for s, v in zip(STREAMS, weights, strict=True)})
        say(f"stream training {regime.name}: {time.monotonic() - start:.0f} s")
    return found
