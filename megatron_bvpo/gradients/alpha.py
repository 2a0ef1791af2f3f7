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
_MAX_LOG_STEP = math.log(10.0)
# Products of the scaled (D, X, W) that are averaged: the upper triangle of their second-moment matrix.
_PRODUCTS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


@dataclass(frozen=True)
class Moments:
    """One probe: unbiased measurements of D, X, W in squared gradient units (gradients/moments.py).

    D and W are squared norms and cannot be negative; X is a dot product and can.
    """

    D: float
    X: float
    W: float


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
        criterion: `mse` or `sgd`.
        kappa: learning rate * smoothness, in (0, 1]; read by `sgd` only.
        moment_decay: weight that an average keeps at each probe, in [0, 1). The averages remember about
            (1 + decay) / (1 - decay) probes.
        prior_sd: how far from the prior alpha may well lie; the estimate is shrunk by
            prior_sd^2 / (prior_sd^2 + error^2). At 0.5 all of [0, 1] lies within one prior_sd of its middle; at
            0.29 an alpha near 0 was pulled up so far that its band covered too little (docs/alpha.md).
    """

    def __init__(
        self,
        *,
        prior: float = 0.5,
        criterion: str = "mse",
        kappa: float = 1.0,
        moment_decay: float = 0.9,
        prior_sd: float = 0.5,
    ) -> None:
        if not 0 <= prior <= 1:
            raise ValueError(f"prior is {prior}; it must be in [0, 1]")
        if criterion not in CRITERIA:
            raise ValueError(f"criterion is {criterion!r}; expected one of {', '.join(CRITERIA)}")
        if not 0 < kappa <= 1:
            raise ValueError(f"kappa is {kappa}; it must be in (0, 1]")
        if not 0 <= moment_decay < 1:
            raise ValueError(f"moment_decay is {moment_decay}; it must be in [0, 1)")
        if not 0 < prior_sd < math.inf:
            raise ValueError(f"prior_sd is {prior_sd}; it must be above 0 and finite")
        self.prior = float(prior)
        self.criterion = criterion
        self.kappa = float(kappa) if criterion == "sgd" else 1.0
        self.moment_decay = float(moment_decay)
        self.prior_sd = float(prior_sd)

        self.probes = 0
        self.ignored = 0
        self.last_ignored = ""
        # Exponentially weighted sums. Dividing by `_weight` is the bias correction.
        self._weight = 0.0
        self._weight_sq = 0.0
        self._first = [0.0] * 3
        self._second = [0.0] * len(_PRODUCTS)
        self._log_scale = 0.0

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
        scale = math.exp(max(self._log_scale, log_D - _MAX_LOG_STEP))
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
        # Logs, because a plain average of D falls no faster than its decay, and gradients may.
        step = min(max(log_D - self._log_scale, -_MAX_LOG_STEP), _MAX_LOG_STEP)
        self._log_scale += gain / self._weight * step
        self.probes += 1

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

    def _ratio(self) -> tuple[float, float] | None:
        """(alpha before clipping and shrinking, its standard error), or None where there is no evidence."""
        n = self.effective_probes
        if self.probes < 2 or n <= 1:
            return None  # one probe shows no spread
        D, X, W = self._means()
        bias_sq = D - W
        if self.criterion == "sgd":
            bias_sq = max(bias_sq, 0.0)
        denominator = bias_sq + self.kappa * W
        if denominator <= _TINY:
            return None
        alpha = (bias_sq + self.kappa * (W - X)) / denominator

        # d alpha / d (D, X, W) = (d numerator - alpha * d denominator) / denominator. Where B was cut at 0 the
        # slope of D - W is kept: its noise did not go away.
        slope = (
            (1 - alpha) / denominator,
            -self.kappa / denominator,
            (1 - alpha) * (self.kappa - 1) / denominator,
        )
        variance = self._variance_along(slope)
        # The mean of n weighted values has variance / n, and a sample's variance is short by 1 - 1/n.
        error = math.sqrt(variance / (n - 1)) * _small_sample_widening(n - 1)
        return alpha, error

    def _variance_along(self, slope: tuple[float, float, float]) -> float:
        """Weighted mean square of slope . (D, X, W) about its mean, over the scaled probes."""
        square = 0.0
        for (i, j), s in zip(_PRODUCTS, self._second, strict=True):
            square += (1 if i == j else 2) * slope[i] * slope[j] * s / self._weight
        mean = sum(g * m for g, m in zip(slope, self._means(), strict=True))
        return max(square - mean**2, 0.0)

    def _shrunk(self) -> tuple[float, float]:
        ratio = self._ratio()
        if ratio is None:
            return self.prior, self.prior_sd
        raw, error = ratio
        trust = self.prior_sd**2 / (self.prior_sd**2 + error**2)
        clipped = min(max(raw, 0.0), 1.0)
        return self.prior + trust * (clipped - self.prior), math.sqrt(trust) * error

    @property
    def alpha(self) -> float:
        """Weight of the trace gradient for the steps after the last probe, in [0, 1]."""
        return self._shrunk()[0]

    @property
    def stderr(self) -> float:
        """Standard error of `alpha`: alpha +- 2 stderr is the band. `prior_sd` without evidence."""
        return self._shrunk()[1]

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
        if self._ratio() is None:
            return f"α stayed at its prior {self.prior:.2f}: {self.probes} probes are no evidence{ignored}"
        return f"α settled at {self.alpha:.2f} ± {self.stderr:.2f}: {self._noise_in_words()}{ignored}"

    def _noise_in_words(self) -> str:
        # Beyond what they share: V_t - C = X and V_e - C = W - X.
        _, trace, both = self._means()
        empty = both - trace
        if trace <= 0:
            return "the trace gradient carries no noise of its own"
        if empty <= 0:
            return "all the noise that differs is in the trace gradient"
        return f"the trace gradient carries {trace / empty:.1f} times the noise of the empty one"

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError if it is not whole; then nothing has changed."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"alpha state has {sorted(state)}; expected {sorted(expected)}")
        first, second = [float(v) for v in state["first"]], [float(v) for v in state["second"]]
        weight, weight_sq, log_scale = (float(state[k]) for k in ("weight", "weight_sq", "log_scale"))
        if len(first) != 3 or len(second) != len(_PRODUCTS):
            raise ValueError(f"alpha state has {len(first)} means and {len(second)} products; expected 3 and 6")
        if not all(math.isfinite(v) for v in (*first, *second, weight, weight_sq, log_scale)):
            raise ValueError("alpha state holds numbers that are not finite")
        self.probes, self.ignored = int(state["probes"]), int(state["ignored"])
        self.last_ignored = str(state["last_ignored"])
        self._weight, self._weight_sq, self._log_scale = weight, weight_sq, log_scale
        self._first, self._second = first, second


def _small_sample_widening(dof: float) -> float:
    """Student's 95.45 % quantile over the normal one (2), so that +- 2 errors cover as said with few probes.

    Cornish-Fisher expansion in 1/dof at z = 2; within 2 % of the exact ratio for dof >= 3 and below it (5.2 for
    7.0) at dof = 1.
    """
    return 1 + 1.25 / dof + 1.53 / dof**2 + 1.43 / dof**3
