"""What a probe measures of two halves, against the truth of a toy and of the bench (MATH.md section 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bvpo.gradients.alpha import Moments
from tests.unit.gaussian_pairs import Gaussian, two_halves

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from truth_bench import exact, frozen, model

    return exact, frozen, model


@pytest.mark.parametrize("n_first", [4, 2])
def test_two_halves_are_unbiased_and_the_usual_mistakes_are_not(n_first, bench):
    toy, rng = Gaussian(), np.random.default_rng(0)
    g_t, g_e = toy.gradients(rng, 20_000)
    right = np.stack(two_halves(g_t, g_e, n_first))
    error = right.std(1) / right.shape[1] ** 0.5
    assert (np.abs(right.mean(1) - [toy.D, toy.X, toy.W]) < 4 * error).all()

    halves = [np.stack([g[:, :n_first].mean(1), g[:, n_first:].mean(1)], 1) for g in (g_t, g_e)]
    np.testing.assert_allclose(bench[1].half_moments(*halves, n_first, toy.pairs), right, rtol=1e-12)

    unpaired = two_halves(g_t, g_e, n_first, paired=False)[1].mean()
    assert unpaired == pytest.approx(toy.V_t, rel=0.02) and unpaired > 1.2 * toy.X
    if n_first == 2:
        plain = np.mean(two_halves(g_t, g_e, n_first, weighted=False), axis=1)
        assert (plain[1:] > 1.25 * np.array([toy.X, toy.W])).all()


def test_bench_truth_agrees_with_its_own_samples(bench):
    exact, frozen, model = bench
    task = model.Task(model.TaskConfig(length=2, prompts=3, empty_answers="strip"))
    rng = np.random.default_rng(0)
    theta = task.theta_ref_P + 0.3 * rng.normal(size=task.theta_ref_P.size)
    true = exact.truth(task, theta)
    steps = 1e-5 * np.eye(theta.size)
    slope = (task.marginal_loss(theta + steps) - task.marginal_loss(theta - steps)) / 2e-5
    np.testing.assert_allclose(true.mu, slope, atol=1e-9)

    g_t, g_e = task.half_gradients(theta[None], task.sample(rng, 20_000, 8), 3)
    probes = np.stack(frozen.half_moments(g_t, g_e, 3, 8))
    at = true.at(8)
    error = probes.std(1) / 20_000**0.5
    assert (np.abs(probes.mean(1) - [at.D, at.X, at.W]) < 4 * error).all()
    # The policy is off its sampler here, so b_t matters and alpha° is not the optimum.
    grid = np.linspace(0, 1, 1001)
    assert grid[at.mse(grid).argmin()] == pytest.approx(at.alpha_star, abs=1e-3)
    assert at.bias_t_sq > 0 and at.alpha_circ != pytest.approx(at.alpha_star, abs=1e-3)


def test_on_its_sampler_the_trace_gradient_has_no_bias(bench):
    exact, _, model = bench
    task = model.Task(model.TaskConfig(length=2, prompts=3))
    true = exact.truth(task, task.theta_ref_P).at(16)
    assert true.bias_t_sq < 1e-25 < true.bias_e_sq
    assert true.alpha_circ == pytest.approx(true.alpha_star, abs=1e-12)


def test_the_noise_of_both_streams_is_measured_right():
    """V_t from its own dot product and V_e from V_t, X and W: unbiased in the toy."""
    toy, rng = Gaussian(), np.random.default_rng(8)
    g_t, g_e = toy.gradients(rng, 4_000)
    halves = {("trace", h): g_t[:, s].mean(1) for h, s in (("A", slice(3)), ("B", slice(3, None)))}
    D, X, W = two_halves(g_t, g_e, 3)
    V_t = 15 / 64 * ((halves["trace", "A"] - halves["trace", "B"]) ** 2).sum(1)
    V_e = [Moments(*probe).V_e for probe in zip(D, X, W, V_t, strict=True)]
    assert V_t.mean() == pytest.approx(toy.V_t, rel=0.03) and np.mean(V_e) == pytest.approx(toy.V_e, rel=0.03)
    assert Moments(1.0, 0.5, 0.6).V_e is None
