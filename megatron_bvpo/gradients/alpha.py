"""From measured gradient moments to alpha, the weight of the trace gradient. Pure: floats in, floats out.

The update is g = alpha * g_t + (1 - alpha) * g_e, with g_t the gradient of the trace loss and g_e that of the
empty-trace loss, each a mean over the pairs of one batch. With b_e the bias of g_e and b_t = 0 assumed, three
numbers decide which alpha is best:

    D = E|g_t - g_e|^2      X = tr Var(g_t) - tr Cov(g_t, g_e)      W = tr Var(g_t - g_e)      D - W = |b_e|^2

    mse:         alpha = 1 - X / D                                   least E|g - mu|^2
    sgd, kappa:  alpha = [B + kappa (W - X)] / [B + kappa W]         least bias^2 + kappa * variance,
                 B = max(D - W, 0)                                   kappa = learning rate * smoothness

`mse` is arXiv 2510.05095's optimum with b_t = 0; `sgd` minimises that paper's error floor of SGD. docs/alpha.md
derives both and says what b_t = 0 costs.

The way of one probe:
  1. scale:   divide it by a slow scale of D that knows only earlier probes. Gradients shrink over a run, and
              without a scale the stale large probes would rule the averages.
  2. average: exponentially weighted means of the scaled D, X, W and of their products.
  3. ratio:   alpha from the averages. Averages of alphas would be biased: a ratio is not linear, and clipping
              is one-sided.
  4. error:   delta method on the ratio, from the spread of the probes, widened for their small number.
  5. shrink:  towards the prior, by how large that error is.
  6. band:    Fieller's set of the ratio, for whoever reads alpha. The delta method's error is too small for that.

`alpha` is for later steps only: an alpha that depends on the gradients that it mixes is worse than a fixed one.
A step reads `alpha`, mixes, and then calls `update`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

CRITERIA = ("mse", "sgd")
# Below this, in units of the scale, a denominator is rounding and alpha is arbitrary.
_TINY = 1e-12
# One odd probe may not count for more than ten usual ones, nor move the scale by more than a factor of ten:
# a spike of the loss would rule the averages for a hundred probes.
MAX_LOG_STEP = math.log(10.0)
# Products of the scaled (D, X, W) that are averaged: the upper triangle of their second-moment matrix.
_PRODUCTS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def kappa_of(criterion: str, kappa: float | None) -> float:
    """What the variance counts beside the squared bias: 1 under `mse`. Raises ValueError for what nothing can take."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if criterion == "mse":
        return 1.0
    if kappa is None or not 0 < kappa <= 1:
        raise ValueError(f"kappa is {kappa}; it must be in (0, 1] with criterion sgd")
    return float(kappa)


def checked_memory(moment_decay: float, prior_sd: float) -> tuple[float, float]:
    """Both as they are given; raises ValueError for what no estimator takes."""
    if not 0 <= moment_decay < 1:
        raise ValueError(f"moment_decay is {moment_decay}; it must be in [0, 1)")
    if not 0 < prior_sd < math.inf:
        raise ValueError(f"prior_sd is {prior_sd}; it must be above 0 and finite")
    return float(moment_decay), float(prior_sd)


@dataclass(frozen=True)
class Moments:
    """One probe: unbiased measurements of D, X, W in squared gradient units (gradients/moments.py).

    D and W are squared norms and cannot be negative; X is a dot product and can. V_t is tr Var(g_t), the noise of
    the trace gradient, or None where it was not measured; no alpha depends on it, only what the summary says.
    """

    D: float
    X: float
    W: float
    V_t: float | None = None

    @property
    def V_e(self) -> float | None:
        """tr Var(g_e): W - V_t + 2 C with C = V_t - X."""
        return None if self.V_t is None else self.W + self.V_t - 2 * self.X


@dataclass(frozen=True)
class PredictedMse:
    """Predicted E|g - mu|^2 of four choices of alpha, in squared gradient units, without the noise that both
    streams share (tr Cov(g_t, g_e)): D, X and W do not hold it, and it is the same for every alpha. Only
    differences between the four mean something, and one of them can be negative.
    """

    trace_only: float
    empty_only: float
    half: float
    chosen: float


class AlphaEstimator:
    """Estimates alpha from probes.

    Args:
        prior: alpha before there is evidence, and what the estimate shrinks to; in [0, 1].
        criterion: `mse` or `sgd`; no default here, for the program's own is --bvpo_criterion's.
        kappa: learning rate * smoothness, in (0, 1]; `sgd` needs it, `mse` does not read it.
        moment_decay: weight that an average keeps at each probe, in [0, 1). The averages remember about
            (1 + decay) / (1 - decay) probes.
        prior_sd: how far from the prior alpha may well lie; the estimate is shrunk by
            prior_sd^2 / (prior_sd^2 + error^2). At 0.5 all of [0, 1] lies within one prior_sd of its middle; at
            0.29 an alpha near 0 was pulled up so far that its band covered too little (docs/alpha.md).
    """

    def __init__(
        self,
        *,
        criterion: str,
        kappa: float | None = None,
        prior: float = 0.5,
        moment_decay: float = 0.9,
        prior_sd: float = 0.5,
    ) -> None:
        if not 0 <= prior <= 1:
            raise ValueError(f"prior is {prior}; it must be in [0, 1]")
        self.prior = float(prior)
        self.kappa = kappa_of(criterion, kappa)
        self.criterion = criterion
        self.moment_decay, self.prior_sd = checked_memory(moment_decay, prior_sd)

        self.probes = 0
        self.ignored = 0
        self.last_ignored = ""
        # Exponentially weighted sums. Dividing by `_weight` is the bias correction.
        self._weight = 0.0
        self._weight_sq = 0.0
        self._first = [0.0] * 3
        self._second = [0.0] * len(_PRODUCTS)
        self._log_scale = 0.0
        # The same for V_t and V_e, with a weight of their own: states of earlier versions do not hold them.
        self._noise = [0.0] * 2
        self._noise_weight = 0.0

    # ------------------------------------------------------------------ one probe

    def update(self, moments: Moments) -> None:
        """Takes in one probe. A probe without information changes nothing but `ignored` and `last_ignored`:
        non-finite numbers, or streams that agree entirely (D = 0). Raises ValueError for D < 0 or W < 0."""
        values = (float(moments.D), float(moments.X), float(moments.W))
        if not all(math.isfinite(v) for v in values):
            self._ignore(f"not finite: D = {moments.D}, X = {moments.X}, W = {moments.W}")
            return
        if moments.D < 0 or moments.W < 0:
            raise ValueError(f"D is {moments.D}, W is {moments.W}; squared norms cannot be negative")
        if moments.D < sys.float_info.min:
            self._ignore("the streams' gradients are equal (D = 0), so that alpha has no effect")
            return

        log_D = math.log(moments.D)
        if self._weight == 0:
            self._log_scale = log_D
        scale = math.exp(max(self._log_scale, log_D - MAX_LOG_STEP))
        scaled = [v / scale for v in values]
        if not all(math.isfinite(v * v) for v in scaled):
            self._ignore(f"out of range: D = {moments.D}, X = {moments.X}, W = {moments.W}")
            return

        decay, gain = self.moment_decay, 1 - self.moment_decay
        self._weight = decay * self._weight + gain
        self._weight_sq = decay**2 * self._weight_sq + gain**2
        self._first = [decay * s + gain * v for s, v in zip(self._first, scaled, strict=True)]
        products = [scaled[i] * scaled[j] for i, j in _PRODUCTS]
        self._second = [decay * s + gain * v for s, v in zip(self._second, products, strict=True)]
        self._add_noise(moments, scale)
        # Logs, because a plain average of D falls no faster than its decay, and gradients may.
        step = min(max(log_D - self._log_scale, -MAX_LOG_STEP), MAX_LOG_STEP)
        self._log_scale += gain / self._weight * step
        self.probes += 1

    def _add_noise(self, moments: Moments, scale: float) -> None:
        if moments.V_t is None or moments.V_e is None or not math.isfinite(moments.V_t / scale):
            return
        decay, gain = self.moment_decay, 1 - self.moment_decay
        self._noise_weight = decay * self._noise_weight + gain
        found = (moments.V_t / scale, moments.V_e / scale)
        self._noise = [decay * s + gain * v for s, v in zip(self._noise, found, strict=True)]

    def _ignore(self, reason: str) -> None:
        self.ignored += 1
        self.last_ignored = reason

    # ------------------------------------------------------------------ what the averages say

    @property
    def effective_probes(self) -> float:
        """Number of equally weighted probes whose mean would be as precise as the averages."""
        return self._weight**2 / self._weight_sq if self._weight else 0.0

    def _means(self) -> list[float]:
        return [s / self._weight for s in self._first]

    def _fraction(self) -> tuple[float, float] | None:
        """(numerator, denominator) of alpha before clipping and shrinking, or None where there is no evidence."""
        if self.probes < 2 or self.effective_probes <= 1:
            return None  # one probe shows no spread
        D, X, W = self._means()
        bias_sq = D - W
        if self.criterion == "sgd":
            bias_sq = max(bias_sq, 0.0)
        denominator = bias_sq + self.kappa * W
        if denominator <= _TINY:
            return None
        return bias_sq + self.kappa * (W - X), denominator

    def _slopes(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Derivatives of the numerator and of the denominator by (D, X, W). Where B was cut at 0 the slope of
        D - W is kept: its noise did not go away."""
        return (1.0, -self.kappa, self.kappa - 1), (1.0, 0.0, self.kappa - 1)

    def _covariance(self, u: tuple[float, ...], v: tuple[float, ...]) -> float:
        """Of u . (D, X, W) and v . (D, X, W) of one scaled probe."""
        product = 0.0
        for (i, j), s in zip(_PRODUCTS, self._second, strict=True):
            product += (u[i] * v[j] if i == j else u[i] * v[j] + u[j] * v[i]) * s / self._weight
        means = self._means()
        along_u, along_v = (sum(a * m for a, m in zip(w, means, strict=True)) for w in (u, v))
        return product - along_u * along_v

    def _linear_error(self, raw: float, denominator: float) -> float:
        """Delta method: d alpha = (d numerator - alpha * d denominator) / denominator."""
        top, bottom = self._slopes()
        slope = tuple((t - raw * b) / denominator for t, b in zip(top, bottom, strict=True))
        # The mean of n weighted values has variance / n, and a sample's variance is short by 1 - 1/n.
        dof = self.effective_probes - 1
        return math.sqrt(max(self._covariance(slope, slope), 0.0) / dof) * small_sample_widening(dof)

    def _shrunk(self) -> float:
        fraction = self._fraction()
        if fraction is None:
            return self.prior
        raw = fraction[0] / fraction[1]
        error = self._linear_error(raw, fraction[1])
        trust = self.prior_sd**2 / (self.prior_sd**2 + error**2)
        return self.prior + trust * (min(max(raw, 0.0), 1.0) - self.prior)

    @property
    def alpha(self) -> float:
        """Weight of the trace gradient for the steps after the last probe, in [0, 1]."""
        return self._shrunk()

    @property
    def band(self) -> tuple[float, float]:
        """Every alpha in [0, 1] that the probes do not contradict at two standard errors (Fieller's set).

        alpha = r means numerator - r * denominator = 0, and that difference is linear in D, X and W: its error is
        known without linearising a ratio. With a small kappa the ratio's linearised error will not do: where noise
        makes D - W too large, alpha comes out too high and that error too small at once.
        """
        fraction = self._fraction()
        if fraction is None:
            return 0.0, 1.0
        top, bottom = self._slopes()
        dof = self.effective_probes - 1
        t_sq = (2 * small_sample_widening(dof)) ** 2 / dof
        # (numerator - r * denominator)^2 <= t^2 * variance, as a r^2 - 2 b r + c <= 0
        a = fraction[1] ** 2 - t_sq * self._covariance(bottom, bottom)
        b = fraction[0] * fraction[1] - t_sq * self._covariance(top, bottom)
        c = fraction[0] ** 2 - t_sq * self._covariance(top, top)
        if a <= 0:
            return 0.0, 1.0  # the denominator may be 0
        root = math.sqrt(max(b * b - a * c, 0.0))
        low, high = (min(max(r / a, 0.0), 1.0) for r in (b - root, b + root))
        return low, high

    @property
    def stderr(self) -> float:
        """Standard error of `alpha`: half its root mean square distance from the ends of `band`. `prior_sd` without
        evidence."""
        if self._fraction() is None:
            return self.prior_sd
        low, high = self.band
        return math.sqrt(((self.alpha - low) ** 2 + (self.alpha - high) ** 2) / 2) / 2

    def predicted_mse(self) -> PredictedMse | None:
        """What the averages predict for the next step; None before the first probe."""
        if not self.probes:
            return None
        scale = math.exp(self._log_scale)
        D, X, _ = (m * scale for m in self._means())

        def mse(alpha: float) -> float:
            return alpha**2 * X + (1 - alpha) ** 2 * (D - X)

        return PredictedMse(mse(1.0), mse(0.0), mse(0.5), mse(self.alpha))

    def summary(self) -> str:
        """One line in words for the end of a run; +- is one standard error."""
        ignored = f"; {self.ignored} probes ignored, the last because {self.last_ignored}" if self.ignored else ""
        if self._fraction() is None:
            return f"α stayed at its prior {self.prior:.2f}: {self.probes} probes are no evidence{ignored}"
        return f"α settled at {self.alpha:.2f} ± {self.stderr:.2f}: {self._noise_in_words()}{ignored}"

    def _noise_in_words(self) -> str:
        if self._noise_weight:
            trace, empty = self._noise
            if empty > 0:
                return f"the trace gradient carries {trace / empty:.1f} times the noise of the empty one"
            return "the empty gradient carries no noise"
        # From a state without V_t: V_t - C = X and V_e - C = W - X are known, the noise beyond what they share.
        _, trace, both = self._means()
        empty = both - trace
        if trace <= 0:
            return "the trace gradient carries no noise of its own"
        if empty <= 0:
            return "all the noise that differs is in the trace gradient"
        return (
            f"beyond the noise that they share, the trace gradient carries {trace / empty:.1f} times that of the "
            "empty one"
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The evidence as JSON-able numbers (exact through JSON). Settings are not part of it: prior, criterion
        and kappa may change between runs and read the same evidence."""
        return {
            "probes": self.probes,
            "ignored": self.ignored,
            "last_ignored": self.last_ignored,
            "weight": self._weight,
            "weight_sq": self._weight_sq,
            "first": list(self._first),
            "second": list(self._second),
            "log_scale": self._log_scale,
            "noise": list(self._noise),
            "noise_weight": self._noise_weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; `noise` may be missing, as in states from before it was kept. Raises
        ValueError if it is not whole; then nothing has changed."""
        state = {"noise": [0.0, 0.0], "noise_weight": 0.0} | state
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"alpha state has {sorted(state)}; expected {sorted(expected)}")
        first, second, noise = ([float(v) for v in state[k]] for k in ("first", "second", "noise"))
        scalars = [float(state[k]) for k in ("weight", "weight_sq", "log_scale", "noise_weight")]
        if len(first) != 3 or len(second) != len(_PRODUCTS) or len(noise) != 2:
            raise ValueError(
                f"alpha state has {len(first)} means, {len(second)} products and {len(noise)} noises; expected 3, 6 "
                "and 2"
            )
        if not all(math.isfinite(v) for v in (*first, *second, *noise, *scalars)):
            raise ValueError("alpha state holds numbers that are not finite")
        self.probes, self.ignored = int(state["probes"]), int(state["ignored"])
        self.last_ignored = str(state["last_ignored"])
        self._weight, self._weight_sq, self._log_scale, self._noise_weight = scalars
        self._first, self._second, self._noise = first, second, noise


def small_sample_widening(dof: float) -> float:
    """Student's 95.45 % quantile over the normal one (2), so that +- 2 errors cover as said with few probes.

    Cornish-Fisher expansion in 1/dof at z = 2; within 2 % of the exact ratio for dof >= 3 and below it (5.2 for
    7.0) at dof = 1.
    """
    return 1 + 1.25 / dof + 1.53 / dof**2 + 1.43 / dof**3
