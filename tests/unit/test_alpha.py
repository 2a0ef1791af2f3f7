"""The alpha estimator against closed forms, Monte Carlo, and mutants of itself.

Each rule of docs/alpha.md has a check that the estimator passes and a mutant that breaks the rule and must not.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments

MSE = {"criterion": "mse"}
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from truth_bench import exact, frozen, model

    return exact, frozen, model


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


# ---------------------------------------------------------------------- the measurement (MATH.md section 3)


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


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("X", "expected"), [(0.3, 0.7), (0.0, 1.0), (1.0, 0.0), (-0.4, 1.0), (1.7, 0.0)])
def test_mse_alpha_is_one_minus_x_over_d_clipped(X, expected):
    assert steady(D=1.0, X=X, W=0.8).alpha == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 0.3, 0.1, 0.01])
def test_sgd_alpha_minimises_the_floor(kappa):
    D, X, W, C = 1.0, 0.7, 0.8, 0.1
    grid = np.linspace(0, 1, 100_001)
    variance = C + grid**2 * X + (1 - grid) ** 2 * (W - X)
    floor = (1 - grid) ** 2 * (D - W) + kappa * variance
    estimator = steady(D, X, W, criterion="sgd", kappa=kappa)
    assert estimator.alpha == pytest.approx(grid[floor.argmin()], abs=1e-4)


def test_kappa_one_is_mse_and_kappa_means_nothing_to_mse():
    plain = steady(1.0, 0.6, 0.9, criterion="mse", kappa=0.01)
    assert plain.alpha == steady(1.0, 0.6, 0.9, criterion="sgd", kappa=1.0).alpha


@pytest.mark.parametrize("kappa", [0.1, 0.05, 0.01])
def test_a_negative_bias_estimate_counts_as_none(kappa):
    # Without the max, 0 at kappa = .1 and 1 at kappa = .05.
    estimator = steady(1.0, 0.6, 1.1, criterion="sgd", kappa=kappa)
    error = estimator.stderr
    assert estimator.alpha == pytest.approx(0.5 / 1.1, abs=0.01) and error < 0.1


def test_predicted_mse_differs_between_alphas_as_the_truth_does():
    toy = Gaussian()
    estimator = steady(toy.D, toy.X, toy.W)

    def mse(alpha):
        variance = alpha**2 * toy.V_t + (1 - alpha) ** 2 * toy.V_e + 2 * alpha * (1 - alpha) * toy.C
        return toy.dim * ((1 - alpha) * toy.bias) ** 2 + variance

    said = estimator.predicted_mse()
    assert said.trace_only - said.empty_only == pytest.approx(mse(1) - mse(0))
    assert said.half - said.empty_only == pytest.approx(mse(0.5) - mse(0))
    assert said.half + toy.C == pytest.approx(mse(0.5))
    assert said.chosen == pytest.approx(mse(toy.alpha) - toy.C)
    assert said.chosen <= min(said.trace_only, said.empty_only, said.half)
    assert AlphaEstimator(**MSE).predicted_mse() is None


# ---------------------------------------------------------------------- rules, each with its mutant


class SmoothsAlpha(AlphaEstimator):
    """Averages alphas instead of moments."""

    def update(self, moments):
        one = 1 - moments.X / moments.D
        super().update(Moments(1.0, 1.0 - min(max(one, 0.0), 1.0), moments.W / moments.D))


class ScalesByItself(AlphaEstimator):
    """Divides a probe by its own D, not by a lagged one: an average of ratios in disguise."""

    def update(self, moments):
        super().update(Moments(1.0, moments.X / moments.D, moments.W / moments.D))


class DoesNotScale(AlphaEstimator):
    """Averages raw moments."""

    def update(self, moments):
        super().update(moments)
        self._log_scale = 0.0


class NoBiasCorrection(AlphaEstimator):
    """Counts the empty start of the averages as evidence."""

    def update(self, moments):
        super().update(moments)
        self._weight = 1.0


class NeverShrinks(AlphaEstimator):
    """Believes two noisy probes."""

    def _shrunk(self):
        top, bottom = self._fraction() or (self.prior, 1.0)
        return min(max(top / bottom, 0.0), 1.0)


class BelievesOneProbe(AlphaEstimator):
    """Needs no spread."""

    def _shrunk(self):
        D, X, _ = self._means() if self.probes else (1.0, 0.5, 1.0)
        return 1 - X / D if self.probes == 1 else super()._shrunk()


class Unclipped(AlphaEstimator):
    def _shrunk(self):
        top, bottom = self._fraction() or (self.prior, 1.0)
        return top / bottom


class TakesNan(AlphaEstimator):
    def update(self, moments):
        if not math.isfinite(moments.D):
            self._first[0] = math.nan
        super().update(moments)


def check_averages_moments(make):
    """Probes of unequal size: the moments' ratio is .7, the mean of the clipped alphas .5."""
    probes = [(1.0, 0.9, 0.9), (3.0, 0.3, 2.0)] * 200
    assert fed(make(moment_decay=0.98), probes).alpha == pytest.approx(0.7, abs=0.04)


def check_shrinking_gradients(make):
    """Gradients fall 30x (moments 900x) over 40 probes while alpha goes from .2 to .8: as without the fall."""
    ratios = [0.8] * 20 + [0.2] * 20
    falling = [np.array([1.0, r, 0.9]) * 30 ** (-2 * i / 40) for i, r in enumerate(ratios)]
    still = fed(make(), [(1.0, r, 0.9) for r in ratios]).alpha
    assert fed(make(), falling).alpha == pytest.approx(still, abs=0.06)
    assert still > 0.65


def check_bias_correction(make):
    toy = Gaussian()
    early = fed(make(moment_decay=0.99), toy.probes(np.random.default_rng(1), 8, 4))
    probe = [s / early._weight for s in early._first]
    assert 0.5 < probe[1] / (toy.X / toy.D) < 2


def check_shrinks_with_little_evidence(make):
    """After three probes in a noisy toy, alpha from the ratio alone is far worse than a shrunk one."""
    toy, rng = Gaussian(dim=2, bias=0.35), np.random.default_rng(2)
    errors = [fed(make(), toy.probes(rng, 3, 4)).alpha - toy.alpha for _ in range(300)]
    assert np.mean(np.square(errors)) < 0.03


def check_one_probe_is_no_evidence(make):
    estimator = make(prior=0.37)
    assert estimator.alpha == 0.37
    assert fed(estimator, [(1.0, 0.1, 0.9)]).alpha == 0.37


def check_stays_in_range(make):
    assert 0 <= fed(make(), [(1.0, 1.5, 1.2)] * 9).alpha <= 1


def check_ignores_non_finite(make):
    probes = [(1.0, 0.6, 0.9), (1.2, 0.5, 1.0), (0.9, 0.6, 0.7)]
    clean = fed(make(), probes)
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            dirty = [*probes[:2], tuple(bad if i == place else 1.0 for i in range(3)), probes[2]]
            estimator = fed(make(), dirty)
            assert (estimator.alpha, estimator.stderr, estimator.ignored) == (clean.alpha, clean.stderr, 1)


CHECKS = [
    (check_averages_moments, [SmoothsAlpha, ScalesByItself]),
    (check_shrinking_gradients, [DoesNotScale]),
    (check_bias_correction, [NoBiasCorrection]),
    (check_shrinks_with_little_evidence, [NeverShrinks]),
    (check_one_probe_is_no_evidence, [BelievesOneProbe]),
    (check_stays_in_range, [Unclipped]),
    (check_ignores_non_finite, [TakesNan]),
]


@pytest.mark.parametrize(("check", "mutants"), CHECKS, ids=[c.__name__ for c, _ in CHECKS])
def test_rule_holds_and_its_mutants_are_caught(check, mutants):
    check(functools.partial(AlphaEstimator, **MSE))
    for mutant in mutants:
        with pytest.raises(AssertionError):
            check(functools.partial(mutant, **MSE))


def test_lagged_alpha_beats_the_same_batchs():
    toy, rng = Gaussian(dim=4, bias=0.7), np.random.default_rng(3)
    lagged, same = [], []
    for _ in range(100):
        g_t, g_e = toy.gradients(rng, 40)
        estimator = AlphaEstimator(**MSE, moment_decay=0.5, prior_sd=1e6)
        for t, e, probe in zip(g_t.mean(1), g_e.mean(1), np.stack(two_halves(g_t, g_e, 4), 1), strict=True):
            before = estimator.alpha
            fed(estimator, [probe])
            after = estimator.alpha
            lagged.append(((before * t + (1 - before) * e) ** 2).sum())
            same.append(((after * t + (1 - after) * e) ** 2).sum())
    difference = np.array(same) - lagged
    assert difference.mean() > 3 * difference.std() / len(difference) ** 0.5


# ---------------------------------------------------------------------- evidence and its error


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moment_decay": 0.97},
        {"criterion": "sgd", "kappa": 0.3},
        {"criterion": "sgd", "kappa": 0.03},
        {"criterion": "sgd", "kappa": 0.03, "moment_decay": 0.97},
    ],
)
@pytest.mark.parametrize("bias", [0.25, 0.1])
def test_the_band_covers(settings, bias):
    toy, rng = Gaussian(dim=30, bias=bias), np.random.default_rng(4)
    B, kappa = toy.D - toy.W, settings.get("kappa", 1.0)
    target = (B + kappa * (toy.W - toy.X)) / (B + kappa * toy.W)
    inside, within, linear = [], [], []
    for _ in range(150):
        estimator = AlphaEstimator(**MSE | settings)
        for j, probe in enumerate(toy.probes(rng, 40, 3)):
            fed(estimator, [probe])
            if j >= 7:
                low, high = estimator.band
                top, bottom = estimator._fraction()
                inside.append(abs(estimator.alpha - target) <= 2 * estimator.stderr)
                within.append(low <= target <= high)
                linear.append(abs(estimator.alpha - target) <= 2 * estimator._linear_error(top / bottom, bottom))
    assert 0.90 <= np.mean(inside) <= 0.985 and 0.93 <= np.mean(within) <= 0.995
    if settings.get("kappa") == 0.03 and bias == 0.1:
        assert np.mean(linear) < 0.88, "the fault that the band mends"


def test_the_mean_alpha_is_near_its_aim():
    toy, rng = Gaussian(dim=30), np.random.default_rng(4)
    errors = [fed(AlphaEstimator(**MSE), toy.probes(rng, 40, 3)).alpha - toy.alpha for _ in range(150)]
    assert abs(np.mean(errors)) < 0.03


def test_without_evidence_the_band_is_everything():
    estimator = AlphaEstimator(**MSE)
    assert estimator.band == (0.0, 1.0)
    assert fed(estimator, [(1.0, 0.5, 0.9)]).band == (0.0, 1.0)
    low, high = steady(1.0, 0.6, 0.9).band
    assert low == pytest.approx(0.4, abs=1e-6) and high == pytest.approx(0.4, abs=1e-6)


def test_more_evidence_narrows_the_band_and_leaves_the_prior():
    toy, rng = Gaussian(bias=0.05), np.random.default_rng(5)
    estimator, said = AlphaEstimator(**MSE, prior=1.0, moment_decay=0.99), []
    for probe in toy.probes(rng, 200, 4):
        fed(estimator, [probe])
        said.append((estimator.alpha, estimator.stderr))
    assert AlphaEstimator(**MSE, prior=1.0).stderr == 0.5 > said[7][1] > said[60][1] > said[199][1]
    assert abs(said[199][0] - toy.alpha) < 0.1 < 1 - said[199][0]


def test_one_spike_does_not_rule():
    probes = [(1.0, 0.6 + 0.01 * (-1) ** i, 0.9) for i in range(20)]
    estimator = fed(AlphaEstimator(**MSE), [*probes, (1e6, 1e6, 1e6), *probes])
    assert estimator.alpha == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e20])
def test_units_do_not_matter(unit):
    probes = Gaussian().probes(np.random.default_rng(6), 30, 4)
    plain, scaled = fed(AlphaEstimator(**MSE), probes), fed(AlphaEstimator(**MSE), unit * probes)
    assert scaled.alpha == pytest.approx(plain.alpha, rel=1e-9)
    assert scaled.stderr == pytest.approx(plain.stderr, rel=1e-9)
    assert scaled.predicted_mse().half == pytest.approx(unit * plain.predicted_mse().half, rel=1e-9)


@pytest.mark.parametrize("D", [0.0, 5e-324])
def test_equal_streams_say_nothing(D):
    estimator = fed(AlphaEstimator(**MSE, prior=0.3), [(D, 0.0, 0.0)] * 5)
    assert (estimator.alpha, estimator.probes, estimator.ignored) == (0.3, 0, 5)
    assert "equal" in estimator.last_ignored and "stayed at its prior 0.30" in estimator.summary()


def test_negative_squares_are_a_fault_of_ours():
    for probe in ((-1.0, 0.0, 1.0), (1.0, 0.0, -1e-9)):
        with pytest.raises(ValueError, match="cannot be negative"):
            AlphaEstimator(**MSE).update(Moments(*probe))


# ---------------------------------------------------------------------- state, words, settings


def test_resume_is_exact():
    probes = Gaussian().probes(np.random.default_rng(7), 30, 4)
    settings = {"criterion": "sgd", "kappa": 0.3, "prior": 0.4}
    whole, first = AlphaEstimator(**settings), AlphaEstimator(**settings)
    fed(whole, probes[:13])
    fed(first, [*probes[:13]])
    first.update(Moments(math.nan, 0.0, 0.0))
    resumed = AlphaEstimator(**settings)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict() and resumed.ignored == 1
    fed(whole, probes[13:])
    fed(resumed, probes[13:])
    assert (resumed.alpha, resumed.stderr) == (whole.alpha, whole.stderr)
    assert resumed.predicted_mse() == whole.predicted_mse()


def test_a_broken_state_is_refused_and_changes_nothing():
    estimator = steady(1.0, 0.6, 0.9)
    good = estimator.state_dict()
    for broken in (
        {k: v for k, v in good.items() if k != "weight"},
        good | {"first": [1.0]},
        good | {"log_scale": math.nan},
        good | {"noise": [1.0]},
        good | {"noise_weight": math.inf},
        good | {"another": 1.0},
    ):
        with pytest.raises(ValueError, match="alpha state"):
            estimator.load_state_dict(broken)
        assert estimator.state_dict() == good


def test_the_summary_says_it_in_words():
    # V_e = W + V_t - 2X = .2
    text = steady(1.0, 0.66, 0.70, V_t=0.82).summary()
    assert text == "α settled at 0.34 ± 0.00: the trace gradient carries 4.1 times the noise of the empty one"
    assert "the empty gradient carries no noise" in steady(1.0, 0.5, 0.5, V_t=0.5).summary()


def test_without_the_trace_noise_the_summary_speaks_of_what_is_not_shared():
    told = "beyond the noise that they share, the trace gradient carries 4.1 times that of the empty one"
    assert told in steady(1.0, 0.66, 0.82).summary()
    assert "no noise of its own" in steady(1.0, -0.1, 0.8).summary()
    assert "all the noise" in steady(1.0, 0.9, 0.8).summary()


def test_a_state_from_before_the_trace_noise_was_kept_still_loads():
    probes = [(1.0, 0.66, 0.70, 0.82)] * 5
    before = fed(AlphaEstimator(**MSE), probes)
    old = {k: v for k, v in before.state_dict().items() if k not in ("noise", "noise_weight")}
    resumed = AlphaEstimator(**MSE)
    resumed.load_state_dict(old)
    assert (resumed.alpha, resumed.stderr) == (before.alpha, before.stderr)
    assert "beyond the noise that they share" in resumed.summary()
    assert "carries 4.1 times the noise of the empty one" in fed(resumed, probes[:1]).summary()


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


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": 1.1},
        {"criterion": "map"},
        {"criterion": "sgd"},
        {"criterion": "sgd", "kappa": 0.0},
        {"moment_decay": 1.0},
        {"prior_sd": 0.0},
        {"prior": math.nan},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AlphaEstimator(**MSE | settings)


def test_it_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'megatron', 'swift'}"
    code = f"import sys, megatron_bvpo.gradients.alpha; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
