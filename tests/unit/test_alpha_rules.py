"""Each rule of docs/alpha.md has a check that the estimator passes and a mutant that breaks the rule and must not."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from tests.unit.gaussian_pairs import MSE, Gaussian, fed, two_halves


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
