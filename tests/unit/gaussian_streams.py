"""Streams with Gaussian gradients, whose best weights are known, and their probes."""

from __future__ import annotations

import numpy as np

from megatron_bvpo.gradients.grams import Grams
from megatron_bvpo.gradients.simplex import simplex_minimum
from megatron_bvpo.gradients.weights import WeightEstimator

NAMES = ("trace", "short", "empty", "other")
SGD = {"criterion": "sgd", "kappa": 0.03}
ALIKE = 1 - 1e-6  # a memory in which all probes count alike


class Gaussian:
    """Rows whose gradients are b_j + noise (mu = 0), the streams' noises sharing a part; halves of 7 and 9 rows."""

    halves = (7, 9)

    def __init__(self, bias=(0.0, 0.04, 0.12), own=(1.0, 0.7, 0.4), shared: float = 0.3, dim: int = 200) -> None:
        self.bias, self.dim, self.k = np.array(bias), dim, len(bias)
        self.row = np.diag(np.square(own)) + shared**2
        self.C = dim * self.row / sum(self.halves)
        self.B = dim * np.outer(self.bias, self.bias)

    def best(self, kappa: float) -> np.ndarray:
        return simplex_minimum((self.B + kappa * self.C)[None])[0]

    def criterion(self, w, kappa: float) -> float:
        return float(w @ (self.B + kappa * self.C) @ w)

    def probes(self, rng: np.random.Generator, number: int) -> list[Grams]:
        root = np.linalg.cholesky(self.row)
        noise = [np.einsum("jk,skd->sjd", root, rng.normal(size=(number, self.k, self.dim))) for _ in range(2)]
        g = [self.bias[:, None] + e / n**0.5 for e, n in zip(noise, self.halves, strict=True)]
        share = np.array(self.halves) / sum(self.halves)
        apart, mean = g[0] - g[1], share[0] * g[0] + share[1] * g[1]
        gap = mean[:, 1:] - mean[:, :1]
        C = share[0] * share[1] * np.einsum("sjd,skd->sjk", apart, apart)
        D = np.einsum("sjd,skd->sjk", gap, gap)
        return [grams_of(*both) for both in zip(C, D, strict=True)]


def grams_of(C: np.ndarray, D: np.ndarray) -> Grams:
    return Grams(NAMES[: len(C)], *(tuple(map(tuple, m.tolist())) for m in (C, D)))


def fed(estimator: WeightEstimator, probes) -> WeightEstimator:
    for probe in probes:
        estimator.update(probe)
    return estimator


def times(probe: Grams, factor: float) -> Grams:
    return Grams(probe.streams, *(tuple(tuple(factor * v for v in row) for row in m) for m in (probe.C, probe.D)))


def array(estimator: WeightEstimator) -> np.ndarray:
    return np.array(list(estimator.weights.values()))
