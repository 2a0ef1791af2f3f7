"""The moments from two halves are unbiased, also where rows lack one of their pairs, unevenly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bvpo.gradients.moments import HalfCounts, _sums, moments_of

DRAWS, DIM = 4000, 6
BIAS, SHARED = 0.4, 0.6  # of the empty gradient; of a pair's two noises


def draw(generator, trace: tuple[int, int], empty: tuple[int, int], both: tuple[int, int]) -> dict:
    """Mean gradients of the halves: the first rows of a half have both pairs, the others one."""
    found = {}
    for half, n, m, k in zip("AB", trace, empty, both, strict=True):
        shared = generator.normal(size=(n + m - k, DIM))
        t = 1 + generator.normal(size=(n, DIM)) + SHARED * shared[:n]
        e = 1 + BIAS + 0.5 * generator.normal(size=(m, DIM)) + SHARED * np.concatenate([shared[:k], shared[n:]])
        found["trace", half], found["empty", half] = torch.tensor(t.mean(0)), torch.tensor(e.mean(0))
    return found


@pytest.mark.parametrize(
    "trace, empty, both",
    [
        ((4, 4), (4, 4), (4, 4)),
        ((4, 4), (1, 4), (1, 4)),  # empty pairs lost
        ((3, 2), (1, 2), (1, 2)),
        ((5, 3), (2, 1), (2, 1)),
        ((2, 4), (4, 5), (2, 4)),  # trace pairs lost, or never there
        ((1, 3), (4, 2), (1, 1)),  # of both kinds
        ((2, 2), (3, 2), (0, 0)),  # no row has both
    ],
)
def test_unbiased(trace, empty, both):
    generator = np.random.default_rng(0)
    counts = HalfCounts(trace, empty, both)
    n, m, k = sum(trace), sum(empty), sum(both)
    V_t, V_e, C = (DIM * v for v in ((1 + SHARED**2) / n, (0.25 + SHARED**2) / m, SHARED**2 * k / (n * m)))
    truth = {"D": DIM * BIAS**2 + V_t + V_e - 2 * C, "X": V_t - C, "W": V_t + V_e - 2 * C, "V_t": V_t}
    found = [moments_of(_sums(draw(generator, trace, empty, both), counts).tolist(), counts) for _ in range(DRAWS)]
    for name, value in truth.items():
        values = np.array([getattr(moments, name) for moments in found])
        error = values.std() / DRAWS**0.5
        assert abs(values.mean() - value) < 4 * error, (name, values.mean(), value, error)
