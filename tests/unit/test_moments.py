"""The moments from two halves are unbiased, also where rows have lost their empty pair unevenly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bvpo.gradients.moments import HalfCounts, _sums, moments_of

DRAWS, DIM = 4000, 6
BIAS, SHARED = 0.4, 0.6  # of the empty gradient; of a pair's two noises


def draw(generator, trace: tuple[int, int], empty: tuple[int, int]) -> dict:
    """Mean gradients of the halves; the first pairs of a half have an empty pair, the others have lost it."""
    found = {}
    for half, n, m in zip("AB", trace, empty, strict=True):
        shared = generator.normal(size=(n, DIM))
        t = 1 + generator.normal(size=(n, DIM)) + SHARED * shared
        e = 1 + BIAS + 0.5 * generator.normal(size=(m, DIM)) + SHARED * shared[:m]
        found["trace", half], found["empty", half] = torch.tensor(t.mean(0)), torch.tensor(e.mean(0))
    return found


@pytest.mark.parametrize("trace, empty", [((4, 4), (4, 4)), ((4, 4), (1, 4)), ((3, 2), (1, 2)), ((5, 3), (2, 1))])
def test_unbiased(trace, empty):
    generator = np.random.default_rng(0)
    counts = HalfCounts(trace, empty)
    n, m = sum(trace), sum(empty)
    V_t, V_e, C = (DIM * v for v in ((1 + SHARED**2) / n, (0.25 + SHARED**2) / m, SHARED**2 / n))
    truth = {"D": DIM * BIAS**2 + V_t + V_e - 2 * C, "X": V_t - C, "W": V_t + V_e - 2 * C, "V_t": V_t}
    found = [moments_of(_sums(draw(generator, trace, empty), counts).tolist(), counts) for _ in range(DRAWS)]
    for name, value in truth.items():
        values = np.array([getattr(moments, name) for moments in found])
        error = values.std() / DRAWS**0.5
        assert abs(values.mean() - value) < 4 * error, (name, values.mean(), value, error)
