"""The least wᵀ M w on the simplex in closed form, and matrices without negative eigenvalues. Pure."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# A determinant below this part of its diagonal's product is rounding.
_SINGULAR = 1e-12


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


def expected_if_not_negative(value: Array, error: Array) -> Array:
    """What to expect of numbers >= 0, all alike before, that were measured as `value` with a normal `error`.

    value + error·φ(z)/Φ(z) with z = value / error: `value` where it is many errors above 0, and error² / |value| where
    it is many below.
    """
    error = np.maximum(error, 1e-9 * np.abs(value).max(initial=sys.float_info.min))
    z = value / error
    near = np.maximum(z, -4.0)
    density = np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi)
    near = near + density / (0.5 * np.vectorize(math.erfc, otypes=[float])(-near / math.sqrt(2)))
    # The continued fraction of Mills' ratio; the sum above cancels there.
    x, far = np.maximum(-z, 4.0), 0.0
    for n in range(40, 1, -1):
        far = n / (x + far)
    return error * np.where(z < -4.0, 1 / (x + far), near)
