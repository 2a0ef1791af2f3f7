"""The estimator on a policy that stands still: its error, its band, and the true gradient MSE that it gives.

A pool of independent probes is measured once per regime (two halves, MATH.md section 3) and dealt out to runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from truth_bench.exact import TrueMoments, truth
from truth_bench.model import Array, Task
from truth_bench.regimes import Regime, policy

WARM_UP = 8  # the first 8 steps of a run all probe, so a band is asked for from here on


def half_moments(g_t: Array, g_e: Array, n_first: int, pairs: int) -> tuple[Array, Array, Array]:
    """D, X, W [S] from the two halves' mean gradients [S, 2, P] (MATH.md section 3)."""
    share = np.array([n_first, pairs - n_first]) / pairs
    d = g_t - g_e
    apart = d[:, 0] - d[:, 1]
    D = (np.einsum("h,shp->sp", share, d) ** 2).sum(1)
    X = share[0] * share[1] * ((g_t[:, 0] - g_t[:, 1]) * apart).sum(1)
    W = share[0] * share[1] * (apart**2).sum(1)
    return D, X, W


@dataclass(frozen=True)
class Pool:
    """M probes: D, X, W [M, 3], and what the same batch's gradients miss mu by: |e_t|^2, |e_e|^2, e_t.e_e [M, 3]."""

    regime: Regime
    true: TrueMoments
    loss: float
    probes_M3: Array
    errors_M3: Array

    @property
    def one_probe_sd(self) -> float:
        """Standard deviation of one probe's share in alpha (the linearised ratio)."""
        D, X, _ = self.probes_M3.T
        return float((X - self.true.X / self.true.D * D).std() / self.true.D)

    def unbiased_z(self) -> list[float]:
        """How many standard errors the pool's mean D, X, W are off the enumerated truth."""
        mean, sd = self.probes_M3.mean(0), self.probes_M3.std(0) / len(self.probes_M3) ** 0.5
        return list((mean - [self.true.D, self.true.X, self.true.W]) / sd)

    def runs(self, rng: np.random.Generator, runs: int, probes: int) -> Array:
        """Indices [runs, probes] into the pool."""
        if runs * probes <= len(self.probes_M3):
            return rng.permutation(len(self.probes_M3))[: runs * probes].reshape(runs, probes)
        return rng.integers(len(self.probes_M3), size=(runs, probes))


def measure_pool(regime: Regime, size: int, chunk: int = 32768) -> Pool:
    task = Task(regime.task)
    theta = policy(regime, task)
    exact = truth(task, theta)
    rng = np.random.default_rng(5)  # 2 was used to choose the estimator's prior_sd
    share = np.array([regime.n_first, regime.pairs - regime.n_first]) / regime.pairs
    probes, errors = [], []
    step = max(chunk // regime.pairs, 1)
    for start in range(0, size, step):
        batch = task.sample(rng, min(step, size - start), regime.pairs)
        g_t, g_e = task.half_gradients(theta[None], batch, regime.n_first)
        probes.append(np.stack(half_moments(g_t, g_e, regime.n_first, regime.pairs), 1))
        e_t, e_e = (np.einsum("h,shp->sp", share, g) - exact.mu for g in (g_t, g_e))
        errors.append(np.stack([(e_t**2).sum(1), (e_e**2).sum(1), (e_t * e_e).sum(1)], 1))
    loss = float(task.marginal_loss(theta[None])[0])
    return Pool(regime, exact.at(regime.pairs), loss, np.concatenate(probes), np.concatenate(errors))


@dataclass(frozen=True)
class Paths:
    """What the estimator said after each probe [runs, probes]; `settings` made it."""

    alpha: Array
    stderr: Array
    index: np.ndarray


def follow(pool: Pool, index: np.ndarray, **settings) -> Paths:
    """Runs one estimator per row of `index`."""
    alpha, stderr = np.zeros(index.shape), np.zeros(index.shape)
    fall = pool.regime.shrink ** (-2 * np.minimum(np.arange(index.shape[1]), 40) / 40)  # moments are squares
    for i, row in enumerate(index):
        estimator = AlphaEstimator(**settings)
        for j, probe in enumerate(pool.probes_M3[row] * fall[:, None]):
            estimator.update(Moments(*map(float, probe)))
            alpha[i, j], stderr[i, j] = estimator.alpha, estimator.stderr
    return Paths(alpha, stderr, index)


def coverage(paths: Paths, target: float, first: int, last: int | None = None) -> float:
    """Share of (run, probe) where target lies within alpha +- 2 stderr."""
    window = np.s_[:, first - 1 : last]
    return float((np.abs(paths.alpha[window] - target) <= 2 * paths.stderr[window]).mean())


def mse_excess(pool: Pool, paths: Paths, first: int, last: int | None = None) -> float:
    """True gradient MSE of the steps after probes first..last over the MSE at alpha°, minus 1."""
    alpha = paths.alpha[:, first - 1 : last]
    return float(pool.true.mse(alpha).mean() / pool.true.mse(pool.true.alpha_circ) - 1)


def lag_penalty(pool: Pool, paths: Paths, first: int) -> tuple[float, float]:
    """Realised gradient MSE over the MSE at alpha°, minus 1: with the alpha of earlier probes, and with one that
    has already seen the batch that it mixes."""
    errors = pool.errors_M3[paths.index[:, first:]]

    def realised(alpha: Array) -> float:
        e = 1 - alpha
        return float((alpha**2 * errors[..., 0] + e**2 * errors[..., 1] + 2 * alpha * e * errors[..., 2]).mean())

    at_circ = realised(np.full(errors.shape[:2], pool.true.alpha_circ))
    return realised(paths.alpha[:, first - 1 : -1]) / at_circ - 1, realised(paths.alpha[:, first:]) / at_circ - 1
