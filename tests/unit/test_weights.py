"""Weights of k streams against closed forms, a solver, Monte Carlo, alpha's estimator, and mutants of themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_bvpo.gradients.alpha import AlphaEstimator
from megatron_bvpo.gradients.grams import Grams
from megatron_bvpo.gradients.simplex import nearest_psd, simplex_minimum
from megatron_bvpo.gradients.weights import WeightEstimator
from tests.unit.gaussian_streams import ALIKE, NAMES, SGD, Gaussian, array, fed, grams_of, times

# ---------------------------------------------------------------------- two streams


@pytest.mark.parametrize("kappa", [1.0, 0.3, 0.03])
def test_with_two_streams_it_is_alphas(kappa):
    """Where no row is lost: the same averages with the same scale, and the same weight before it is shrunk."""
    toy = Gaussian(bias=(0.0, 0.1), own=(1.0, 0.5))
    alpha = AlphaEstimator(criterion="sgd", kappa=kappa)
    ours = WeightEstimator(NAMES[:2], criterion="sgd", kappa=kappa)
    for i, probe in enumerate(toy.probes(np.random.default_rng(1), 40)):
        probe = times(probe, 30 ** (-2 * i / 40) * (100 if i == 9 else 1))
        alpha.update(probe.moments())
        ours.update(probe)
        if i < 1:
            continue
        mean = ours._shares() @ np.array(ours._kept)
        tt, te, ee, D = mean
        np.testing.assert_allclose([D, tt - te, tt + ee - 2 * te], alpha._means(), rtol=1e-12)
        top, bottom = alpha._fraction()
        w = ours.clipped_weights(mean[None])[0]
        np.testing.assert_allclose(w, [top / bottom, 1 - top / bottom], rtol=0, atol=1e-12)
        assert ours._log_scale == pytest.approx(alpha._log_scale, rel=1e-12)
        assert ours.effective_probes == pytest.approx(alpha.effective_probes, rel=1e-12)


# ---------------------------------------------------------------------- Monte Carlo


@pytest.mark.parametrize(("kappa", "probes", "bound"), [(1.0, 20, 0.03), (0.03, 20, 0.10), (0.03, 60, 0.03)])
def test_the_criterion_of_the_estimated_weights_is_near_the_best(kappa, probes, bound):
    toy, rng = Gaussian(bias=(0.0, 0.07, 0.15)), np.random.default_rng(2)
    least, found = toy.criterion(toy.best(kappa), kappa), []
    for _ in range(60):
        estimator = WeightEstimator(NAMES[:3], criterion="sgd", kappa=kappa, moment_decay=ALIKE)
        found.append(toy.criterion(array(fed(estimator, toy.probes(rng, probes))), kappa))
    assert np.mean(found) / least - 1 < bound


def test_moving_a_hidden_bias_up_pays():
    """In few dimensions the bias drowns in noise; taking it for 0 where it comes out negative costs far more."""
    toy, rng = Gaussian(dim=12), np.random.default_rng(3)
    least, expected, clipped = toy.criterion(toy.best(0.03), 0.03), [], []
    for _ in range(60):
        estimator = fed(WeightEstimator(NAMES[:3], **SGD, moment_decay=ALIKE), toy.probes(rng, 20))
        expected.append(toy.criterion(array(estimator), 0.03))
        mean = estimator._shares() @ np.array(estimator._kept)
        clipped.append(toy.criterion(estimator.clipped_weights(mean[None])[0], 0.03))
    assert np.mean(expected) / least - 1 < 0.3 < 0.6 < np.mean(clipped) / least - 1


@pytest.mark.parametrize("settings", [{"kappa": 1.0}, {}, {"moment_decay": 0.97}])
def test_the_bands_cover(settings):
    toy, rng = Gaussian(), np.random.default_rng(4)
    settings = {**SGD, **settings}
    target, inside, within = toy.best(settings["kappa"]), [], []
    between = (0.01 < target) & (target < 0.99)  # a band that ends at 0 holds a 0 always
    for _ in range(60):
        estimator = WeightEstimator(NAMES[:3], **settings)
        for i, probe in enumerate(toy.probes(rng, 40), 1):
            estimator.update(probe)
            if i % 8 == 0:
                bands, w = np.array(list(estimator.bands.values())), array(estimator)
                inside.append(((bands[:, 0] <= target) & (target <= bands[:, 1]))[between])
                within.append((bands[:, 0] <= w) & (w <= bands[:, 1]))
    assert 0.90 <= np.mean(inside) <= 0.985 and np.all(within)


@pytest.mark.parametrize("empty_answers", ["own", "strip"])
def test_the_benchs_truth_agrees_with_its_own_samples(monkeypatch, empty_answers):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from truth_bench import exact, model, streams

    task = model.Task(model.TaskConfig(length=2, prompts=3, empty_answers=empty_answers))
    short, rng = task.shortened(), np.random.default_rng(22)
    theta = task.theta_ref_P + 0.3 * rng.normal(size=task.theta_ref_P.size)
    true, two = streams.streams_truth(task, short, theta), exact.truth(task, theta)
    np.testing.assert_allclose(true.mean_kP[:2], [two.mean_t, two.mean_e], atol=1e-12)
    np.testing.assert_allclose(true.one_row_kk[:2, :2], [[two.var_t, two.cov], [two.cov, two.var_e]], rtol=1e-9)

    batch = task.sample(rng, 6_000, 8)
    g = streams.half_gradients(task, short, theta[None], batch, streams.sample_short(task, short, rng, batch), 3)
    triangles = streams.gram_triangles(g, 3, 8)
    C, bias = true.one_row_kk / 8, true.mean_kP - true.mean_kP[0]
    D = bias @ bias.T + C - C[:1] - C[:, :1] + C[0, 0]
    right = np.concatenate([C[np.triu_indices(3)], D[1:, 1:][np.triu_indices(2)]])
    assert (np.abs(triangles.mean(0) - right) < 4 * triangles.std(0) / len(triangles) ** 0.5).all()
    assert bias[2] @ bias[2] > 1e-6 and not np.isclose(C[0, 2], 0, atol=1e-6)


# ---------------------------------------------------------------------- rules, each with its mutant


class DropsTheCrossTerm(WeightEstimator):
    """Takes the streams' noises for independent."""

    def _matrices(self, values):
        C, B = super()._matrices(values)
        return np.eye(C.shape[-1]) * C, B


class ForgetsTheNoiseOfTheGap(WeightEstimator):
    """Takes D for the squared biases."""

    def _matrices(self, values):
        C, B = super()._matrices(values)
        return C, B + (C - C[..., :1] - C[..., :1, :] + C[..., :1, :1])


class TurnsAStreamAround(WeightEstimator):
    def update(self, grams):
        C = tuple(tuple(-v if (i == 1) != (j == 1) else v for j, v in enumerate(row)) for i, row in enumerate(grams.C))
        super().update(Grams(grams.streams, C, grams.D))


class DoesNotClip(WeightEstimator):
    """Lets B be what it comes out as."""

    def expected_weights(self, values, spread):
        C, B = self._matrices(values)
        return simplex_minimum(B + self.kappa * C)


class DoesNotScale(WeightEstimator):
    """Averages raw matrices."""

    def update(self, grams):
        self._log_scale = 0.0
        if not self._kept:
            super().update(times(grams, 1 / np.trace(grams.D)))
            self._kept[-1] = [v for triangle in grams.triangles() for v in triangle]
        else:
            super().update(grams)
        self._log_scale = 0.0


class ScalesByItself(WeightEstimator):
    """Divides a probe by its own D: an average of ratios in disguise."""

    def update(self, grams):
        super().update(times(grams, len(grams.D) / np.trace(grams.D)))


class IgnoresKappa(WeightEstimator):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.kappa = 1.0


class NeverShrinks(WeightEstimator):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.prior_sd = 1e9


class BelievesOneProbe(WeightEstimator):
    def _solved(self):
        if self.probes == 1:
            return self.clipped_weights(np.array(self._kept))[0]
        return super()._solved()


def check_finds_the_best_weights(make):
    for kappa in (1.0, 0.1):
        toy = Gaussian(shared=0.6)
        estimator = fed(make(kappa=kappa, moment_decay=ALIKE), toy.probes(np.random.default_rng(5), 400))
        np.testing.assert_allclose(array(estimator), toy.best(kappa), atol=0.04)


def check_counts_a_negative_bias_as_none(make):
    """B of the other two streams has the eigenvalues .4 and -.2: without the clip their difference would be free."""
    C, B = np.array([[0.5, 0, 0], [0, 0.1, 0], [0, 0, 0.1]]), np.array([[0, 0, 0], [0, 0.1, 0.3], [0, 0.3, 0.1]])
    D = (B + C - C[:1] - C[:, :1] + C[0, 0])[1:, 1:]
    estimator = fed(make(kappa=0.1), [grams_of(C, D)] * 20)
    clipped = simplex_minimum((nearest_psd(B) + 0.1 * C)[None])[0]
    np.testing.assert_allclose(array(estimator), clipped, atol=1e-3)


def check_shrinking_gradients(make):
    """Gradients fall 30x over 40 probes while the noise of the trace grows: as without the fall."""
    rng = np.random.default_rng(6)
    early, late = Gaussian(own=(0.4, 0.7, 0.4)), Gaussian(own=(1.5, 0.7, 0.4))
    probes = [*early.probes(rng, 20), *late.probes(rng, 20)]
    falling = [times(p, 30 ** (-2 * i / 40)) for i, p in enumerate(probes)]
    still = array(fed(make(), probes))
    assert still[0] < 0.7
    np.testing.assert_allclose(array(fed(make(), falling)), still, atol=0.06)


def check_averages_matrices(make):
    """Small probes with a noisy trace and large ones with a quiet trace: the matrices' mean is ruled by the large."""
    quiet, noisy = Gaussian(own=(0.2, 0.7, 0.4)), Gaussian(own=(1.5, 0.7, 0.4))
    rng = np.random.default_rng(7)
    pairs = zip(quiet.probes(rng, 150), noisy.probes(rng, 150), strict=True)
    probes = [p for a, b in pairs for p in (times(a, 3.0), times(b, 0.3))]
    C, B = (3 * x + 0.3 * y for x, y in ((quiet.C, noisy.C), (quiet.B, noisy.B)))
    best = simplex_minimum((B + C)[None])[0]
    estimator = fed(make(kappa=1.0, moment_decay=ALIKE), probes)
    np.testing.assert_allclose(array(estimator), best, atol=0.08)


def check_shrinks_with_little_evidence(make):
    toy, rng = Gaussian(bias=(0.0, 0.3, 0.4), dim=3), np.random.default_rng(9)
    errors = [array(fed(make(kappa=1.0), toy.probes(rng, 3))) - toy.best(1.0) for _ in range(150)]
    assert np.square(errors).sum(1).mean() < 0.095


def check_one_probe_is_no_evidence(make):
    estimator = make(prior={"trace": 0.6, "short": 0.3, "empty": 0.1})
    assert estimator.weights == pytest.approx({"trace": 0.6, "short": 0.3, "empty": 0.1})
    one = fed(estimator, Gaussian().probes(np.random.default_rng(10), 1))
    assert one.weights == pytest.approx({"trace": 0.6, "short": 0.3, "empty": 0.1})


CHECKS = [
    (check_finds_the_best_weights, [DropsTheCrossTerm, ForgetsTheNoiseOfTheGap, TurnsAStreamAround, IgnoresKappa]),
    (check_counts_a_negative_bias_as_none, [DoesNotClip]),
    (check_shrinking_gradients, [DoesNotScale]),
    (check_averages_matrices, [ScalesByItself]),
    (check_shrinks_with_little_evidence, [NeverShrinks]),
    (check_one_probe_is_no_evidence, [BelievesOneProbe]),
]


@pytest.mark.parametrize(("check", "mutants"), CHECKS, ids=[c.__name__ for c, _ in CHECKS])
def test_rule_holds_and_its_mutants_are_caught(check, mutants):
    def maker(kind):
        return lambda **settings: kind(NAMES[:3], **SGD | settings)

    check(maker(WeightEstimator))
    for mutant in mutants:
        with pytest.raises(AssertionError):
            check(maker(mutant))


# ---------------------------------------------------------------------- evidence


def test_without_evidence_the_bands_are_everything():
    estimator = WeightEstimator(NAMES[:3], **SGD)
    assert estimator.weights == {"trace": 0.5, "short": 0.25, "empty": 0.25}
    assert set(estimator.bands.values()) == {(0.0, 1.0)} and set(estimator.stderr.values()) == {0.5}
    steady = fed(estimator, Gaussian().probes(np.random.default_rng(11), 1) * 20)
    assert all(high - low < 1e-6 for low, high in steady.bands.values())


def test_four_streams():
    toy = Gaussian(bias=(0.0, 0.02, 0.12, 0.05), own=(1.0, 0.9, 0.4, 0.7))
    estimator = WeightEstimator(NAMES, criterion="mse", moment_decay=ALIKE)
    fed(estimator, toy.probes(np.random.default_rng(12), 300))
    np.testing.assert_allclose(array(estimator), toy.best(1.0), atol=0.04)
    assert sum(estimator.weights.values()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e20])
def test_units_do_not_matter(unit):
    probes = Gaussian().probes(np.random.default_rng(13), 30)
    plain = fed(WeightEstimator(NAMES[:3], **SGD), probes)
    scaled = fed(WeightEstimator(NAMES[:3], **SGD), [times(p, unit) for p in probes])
    np.testing.assert_allclose(array(scaled), array(plain), atol=1e-8)
    np.testing.assert_allclose(list(scaled.bands.values()), list(plain.bands.values()), atol=1e-8)


def test_one_spike_does_not_rule():
    probes = Gaussian().probes(np.random.default_rng(14), 40)
    spiked = fed(WeightEstimator(NAMES[:3], **SGD), [*probes[:20], times(probes[0], 1e6), *probes[20:]])
    np.testing.assert_allclose(array(spiked), array(fed(WeightEstimator(NAMES[:3], **SGD), probes)), atol=0.1)


def test_what_says_nothing_is_ignored():
    probes = Gaussian().probes(np.random.default_rng(15), 5)
    clean = fed(WeightEstimator(NAMES[:3], **SGD), probes)
    for factor, word in ((math.nan, "not finite"), (math.inf, "not finite"), (0.0, "equal")):
        dirty = fed(WeightEstimator(NAMES[:3], **SGD), [*probes[:2], times(probes[3], factor), *probes[2:]])
        assert (dirty.weights, dirty.bands, dirty.ignored) == (clean.weights, clean.bands, 1)
        assert word in dirty.last_ignored and word in dirty.summary()
    equal = fed(WeightEstimator(NAMES[:3], **SGD), [times(probes[0], 0.0)] * 3)
    assert "stayed at their prior (trace 0.50, short 0.25, empty 0.25)" in equal.summary()


def test_a_fault_of_ours_is_refused():
    probe = Gaussian().probes(np.random.default_rng(16), 1)[0]
    estimator = WeightEstimator(NAMES[:3], **SGD)
    with pytest.raises(ValueError, match="cannot be negative"):
        estimator.update(times(probe, -1.0))
    with pytest.raises(ValueError, match="expected trace, short, empty"):
        estimator.update(Grams(("trace", "empty", "short"), probe.C, probe.D))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"criterion": "map"}, "criterion"),
        ({"kappa": None}, "kappa"),
        ({"kappa": 0.0}, "kappa"),
        ({"moment_decay": 1.0}, "moment_decay"),
        ({"prior_sd": 0.0}, "prior_sd"),
        ({"prior": {"trace": 0.5, "short": 0.6, "empty": -0.1}}, "prior"),
        ({"prior": {"trace": 0.5, "short": 0.6, "empty": 0.1}}, "prior"),
        ({"prior": {"trace": 0.5, "short": 0.5}}, "prior"),
        ({"streams": ("trace",)}, "streams"),
        ({"streams": ("trace", "trace")}, "streams"),
    ],
)
def test_wrong_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        WeightEstimator(**{"streams": NAMES[:3], **SGD, **settings})
