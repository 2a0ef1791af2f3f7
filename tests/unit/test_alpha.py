"""The alpha estimator against closed forms and Monte Carlo: what it says, its error, its state and its words."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from tests.unit.gaussian_pairs import MSE, Gaussian, fed, steady

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
