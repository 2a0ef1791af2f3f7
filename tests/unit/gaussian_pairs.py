"""Pairs whose trace and empty gradients are Gaussian, what two halves of them measure, and estimators fed with it."""

from __future__ import annotations

import numpy as np

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments

MSE = {"criterion": "mse"}


class Gaussian:
    """Pairs whose gradients are mu + noise (trace) and mu + b + noise (empty), the noises sharing a part."""

    def __init__(self, dim: int = 12, pairs: int = 8, bias: float = 0.25, shared: float = 0.5) -> None:
        self.dim, self.pairs, self.bias, self.shared = dim, pairs, bias, shared
        self.V_t, self.V_e = dim * (1 + shared**2) / pairs, dim * (0.25 + shared**2) / pairs
        self.C = dim * shared**2 / pairs
        self.W = self.V_t + self.V_e - 2 * self.C
        self.D, self.X = dim * bias**2 + self.W, self.V_t - self.C
        self.alpha = 1 - self.X / self.D

    def gradients(self, rng: np.random.Generator, batches: int) -> tuple[np.ndarray, np.ndarray]:
        """g_t and g_e of every pair [S, N, P], with mu = 0."""
        shape = (batches, self.pairs, self.dim)
        z = self.shared * rng.normal(size=shape)
        return z + rng.normal(size=shape), z + 0.5 * rng.normal(size=shape) + self.bias

    def probes(self, rng: np.random.Generator, batches: int, n_first: int) -> np.ndarray:
        return np.stack(two_halves(*self.gradients(rng, batches), n_first), 1)


def two_halves(g_t, g_e, n_first: int, *, weighted: bool = True, paired: bool = True):
    """D, X, W [S] straight from the pairs' gradients; the flags are the mistakes one could make."""
    n = g_t.shape[1]
    share = (n_first / n, 1 - n_first / n) if weighted else (0.5, 0.5)
    halves = [(g[:, :n_first].mean(1), g[:, n_first:].mean(1)) for g in (g_t, g_e)]
    (tA, tB), (eA, eB) = halves
    dA, dB = tA - eA, tB - eB
    D = ((share[0] * dA + share[1] * dB) ** 2).sum(1)
    X = share[0] * share[1] * ((tA - tB) * ((dA - dB) if paired else (tA - tB))).sum(1)
    W = share[0] * share[1] * ((dA - dB) ** 2).sum(1)
    return D, X, W


def fed(estimator: AlphaEstimator, probes) -> AlphaEstimator:
    for probe in probes:
        estimator.update(Moments(*map(float, probe)))
    return estimator


def steady(D: float, X: float, W: float, V_t: float | None = None, **settings) -> AlphaEstimator:
    probe = (D, X, W) if V_t is None else (D, X, W, V_t)
    return fed(AlphaEstimator(**MSE | settings), [probe] * 20)
