"""The closed form on the simplex against optimality, a solver and a grid; what to expect of B by integration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize

from megatron_bvpo.gradients.simplex import expected_if_not_negative, nearest_psd, simplex_minimum


def matrices(k: int):
    rng = np.random.default_rng(k)
    for rank in range(1, k + 1):
        for _ in range(60):
            root = rng.normal(size=(k, rank)) + rng.choice([0.0, 0.5, 3.0])
            yield root @ root.T
    for _ in range(20):  # nearly the same stream twice, and scales far apart
        root = rng.normal(size=(k, k))
        root[1] = root[0] + rng.choice([0.0, 1e-7, 1e-3]) * rng.normal(size=k)
        yield root @ root.T * rng.choice([1e-12, 1.0, 1e9])
    yield np.array([[1.0, -1.0], [-1.0, 1.0]]) if k == 2 else np.eye(k)
    yield np.zeros((k, k))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_closed_form_is_optimal(k):
    """wᵀMw is convex, so that no direction down from w inside the simplex is the proof that w is best."""
    for M in matrices(k):
        w = simplex_minimum(M[None])[0]
        size = max(np.abs(M).max(), 1e-300)
        assert w.min() >= 0 and w.sum() == pytest.approx(1, abs=1e-9)
        assert (M @ w).min() >= w @ M @ w - 1e-7 * size


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_closed_form_agrees_with_a_solver_and_a_grid(k):
    steps = 20
    grid = np.array([p for p in itertools.product(range(steps + 1), repeat=k) if sum(p) == steps]) / steps
    for M in list(matrices(k))[::12]:
        w = simplex_minimum(M[None])[0]
        size = np.abs(M).max() or 1.0
        assert w @ M @ w <= np.einsum("rj,jk,rk->r", grid, M, grid).min() + 1e-12 * size
        solved = minimize(
            lambda x, M=M / size: x @ M @ x,
            np.full(k, 1 / k),
            jac=lambda x, M=M / size: 2 * M @ x,
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 300},
        )
        assert w @ M @ w / size == pytest.approx(solved.fun, abs=1e-8)


def test_many_matrices_at_once_are_each_alone():
    many = np.array([M for M in matrices(3)])
    np.testing.assert_array_equal(simplex_minimum(many), [simplex_minimum(M[None])[0] for M in many])


def test_the_nearest_matrix_without_negative_eigenvalues():
    M = np.array([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1
    np.testing.assert_allclose(nearest_psd(M), np.full((2, 2), 1.5), atol=1e-12)
    np.testing.assert_allclose(nearest_psd(np.diag([2.0, 1.0])), np.diag([2.0, 1.0]), atol=1e-12)


@pytest.mark.parametrize("z", [-60, -12, -4.001, -4, -3.999, -1, 0, 0.5, 3, 30])
def test_what_to_expect_of_a_number_that_is_not_negative(z):
    found = expected_if_not_negative(np.array([2.0 * z]), np.array([2.0]))[0]

    def density(x):
        return math.exp(-0.5 * (x - z) ** 2 + 0.5 * min(z, 0.0) ** 2)

    end = max(z, 0) + 12
    points = [max(z, 0.0)]
    top, bottom = (quad(lambda x, p=p: x**p * density(x), 0, end, points=points, limit=200)[0] for p in (1, 0))
    assert found == pytest.approx(2 * top / bottom, rel=1e-6)


def test_a_number_without_error_is_cut_at_zero():
    found = expected_if_not_negative(np.array([1.0, -1.0]), np.array([0.0, 0.0]))
    np.testing.assert_allclose(found, [1.0, 0.0], atol=1e-8)
