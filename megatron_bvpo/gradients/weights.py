"""From measured Gram matrices to the weights of k streams' gradients. Pure: floats in, floats out.

The update is g = Σ_j w_j g_j with w on the simplex. Stream 1 is the best-centred one, b_1 = 0 assumed; with
C_jk = tr Cov(g_j, g_k), D_jk = E⟨g_j − g_1, g_k − g_1⟩ and B_jk = ⟨b_j, b_k⟩ (MATH.md §5):

    B_jk = D_jk − (C_jk − C_1j − C_1k + C_11)       M = B + κ·C       w° = argmin over the simplex of wᵀ M w

κ = 1 asks for the least E|g − μ|² (criterion `mse`), κ < 1 for the least bias² + κ·variance (`sgd`). Two streams have
an estimator of their own (gradients/alpha.py), which aims at the same: docs/alpha.md.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_bvpo.gradients.alpha import Moments

Array = NDArray[np.float64]
Matrix = tuple[tuple[float, ...], ...]
# A determinant below this part of its diagonal's product is rounding.
_SINGULAR = 1e-12


def pairs_of(names: Sequence) -> list[tuple]:
    """Each two of `names`, each with itself first: the upper triangle, row by row."""
    return list(itertools.combinations_with_replacement(names, 2))


@dataclass(frozen=True)
class Grams:
    """One probe: unbiased measurements of C and D in squared gradient units (gradients/moments.py).

    Attributes:
        streams: k names; the first one is the best-centred stream.
        C: [k, k], symmetric.
        D: [k − 1, k − 1], symmetric, of the streams but the first.
    """

    streams: tuple[str, ...]
    C: Matrix
    D: Matrix

    @classmethod
    def of_triangles(cls, streams: Sequence[str], C: Sequence[float], D: Sequence[float]) -> Grams:
        """From the upper triangles, row by row."""
        return cls(tuple(streams), _symmetric(len(streams), C), _symmetric(len(streams) - 1, D))

    def triangles(self) -> tuple[list[float], list[float]]:
        """Upper triangles of C and of D."""
        return _triangle(self.C), _triangle(self.D)

    def moments(self) -> Moments:
        """D, X, W and V_t of two streams, as the estimator of alpha takes them."""
        (noise, covariance), (_, other) = self.C
        # Where halves hold other shares of the streams' rows the factors differ, and W is no square: not below 0.
        W = max(noise + other - 2 * covariance, 0.0)
        return Moments(D=self.D[0][0], X=noise - covariance, W=W, V_t=noise)


def _symmetric(size: int, triangle: Sequence[float]) -> Matrix:
    found = dict(zip(pairs_of(range(size)), triangle, strict=True))
    return tuple(tuple(found[min(i, j), max(i, j)] for j in range(size)) for i in range(size))


def _triangle(matrix: Matrix) -> list[float]:
    return [matrix[i][j] for i, j in pairs_of(range(len(matrix)))]


# ------------------------------------------------------------------ the closed form


def nearest_psd(matrix: Array) -> Array:
    """The nearest positive semidefinite matrices to [.., n, n] symmetric ones: negative eigenvalues become 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0.0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)


def simplex_minimum(M: Array) -> Array:
    """w [R, k] on the simplex with the least wᵀ M w, for positive semidefinite M [R, k, k].

    The minimum is the best one of some subset of the streams with all weights in the inside. Each subset has a closed
    form: with w = e_l + N z, where l is its first stream and the columns of N are the others' unit vectors minus e_l,
    (NᵀMN) z = −NᵀM e_l. Where NᵀMN is singular the subset's best is on its border as well, so another one has it.
    """
    R, k = M.shape[:2]
    best, found = np.full(R, np.inf), np.zeros((R, k))
    for size in range(1, k + 1):
        for subset in itertools.combinations(range(k), size):
            w = np.zeros((R, k))
            first, others = subset[0], list(subset[1:])
            w[:, first] = 1.0
            usable = np.ones(R, dtype=bool)
            if others:
                MN = M[:, :, others] - M[:, :, [first]]
                quadratic, linear = MN[:, others] - MN[:, [first]], -MN[:, first]
                scale = np.prod(np.diagonal(quadratic, axis1=1, axis2=2), axis=1)
                usable = np.linalg.det(quadratic) > _SINGULAR * scale
                quadratic[~usable] = np.eye(len(others))
                z = np.linalg.solve(quadratic, linear[..., None])[..., 0]
                w[:, others] = z
                w[:, first] -= z.sum(1)
            usable &= (w >= 0).all(1)
            value = np.where(usable, np.einsum("rj,rjk,rk->r", w, M, w), np.inf)
            better = value < best
            best[better], found[better] = value[better], w[better]
    return found
