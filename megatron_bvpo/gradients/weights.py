"""From measured Gram matrices to the weights of k streams' gradients. Pure: floats in, floats out.

The update is g = Σ_j w_j g_j with w on the simplex. Stream 1 is the best-centred one, b_1 = 0 assumed; with
C_jk = tr Cov(g_j, g_k), D_jk = E⟨g_j − g_1, g_k − g_1⟩ and B_jk = ⟨b_j, b_k⟩ (MATH.md §5):

    B_jk = D_jk − (C_jk − C_1j − C_1k + C_11)       M = B + κ·C       w° = argmin over the simplex of wᵀ M w

κ = 1 asks for the least E|g − μ|² (criterion `mse`), κ < 1 for the least bias² + κ·variance (`sgd`). Two streams have
an estimator of their own (gradients/alpha.py), which aims at the same. docs/alpha.md says what the bench found.

The way of a probe is alpha's: divided by a slow scale that knows only earlier probes, then averaged with weights that
fall with its age. What differs:
  1. Probes are kept, not summed up, so that parts of them can be left out.
  2. B is small and its estimate is not: where noise makes it negative, taking 0 says that a biased stream has no bias,
     and with a small κ that costs much more than the opposite error. So B's eigenvalues are replaced by what is to be
     expected of a number that is not negative and was measured with their error.
  3. The error is a jackknife's that leaves out half of the probes at a time: 63 balanced halves and what they leave.
     Leaving out one at a time is blind to the corners of the simplex and of B ≥ 0.
  4. The band holds the middle 95 % of the halves' weights, with B cut at 0 and not moved up, so that it does not take
     for known what point 2 assumes.

`weights` is for later steps only, as alpha is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from megatron_bvpo.gradients.alpha import MAX_LOG_STEP, checked_memory, kappa_of, small_sample_widening
from megatron_bvpo.gradients.grams import Grams, pairs_of
from megatron_bvpo.gradients.simplex import Array, expected_if_not_negative, nearest_psd, simplex_minimum

# A criterion below this, in units of the scale, is rounding and the weights are arbitrary.
_TINY = 1e-12
# Probes that are kept; at a decay of .99 older ones count for less than a per cent together.
_KEPT = 512
# A half of the probes has this much more weight than usual and the others less. At 1 a few probes could all be left
# out at once.
_TILT = 0.95
# 63 halves of 63 probes: a Hadamard matrix without its row and column of ones.
_SIGNS = reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * 6)[1:, 1:]


@dataclass(frozen=True)
class _Evidence:
    """n kept probes: their shares [n], numbers [n, k²], mean [k²], the halves' means [126, k²], the degrees of
    freedom, and the factor from the halves' spread to the mean's error."""

    shares: Array
    kept: Array
    mean: Array
    halves: Array
    dof: float
    widening: float


class WeightEstimator:
    """Estimates the streams' weights from probes.

    Args:
        streams: names, the best-centred stream first.
        criterion: `mse` or `sgd`; no default here, for the program's own is --bvpo_criterion's.
        kappa: learning rate * smoothness, in (0, 1]; `sgd` needs it, `mse` does not read it.
        prior: weights before there is evidence, and what the estimate shrinks to; a half for the first stream and
            equal shares of the other half for the others where it is not given.
        moment_decay: weight that a probe keeps at each further one, in [0, 1). The averages remember about
            (1 + decay) / (1 - decay) probes.
        prior_sd: how far from the prior a weight may well lie, as in gradients/alpha.py.
    """

    def __init__(
        self,
        streams: Sequence[str],
        *,
        criterion: str,
        kappa: float | None = None,
        prior: dict[str, float] | None = None,
        moment_decay: float = 0.9,
        prior_sd: float = 0.5,
    ) -> None:
        self.streams = tuple(streams)
        others = len(self.streams) - 1
        if others < 1 or len(set(self.streams)) <= others:
            raise ValueError(f"streams are {', '.join(self.streams)}; expected two different ones or more")
        if prior is None:
            prior = {s: 0.5 if i == 0 else 0.5 / others for i, s in enumerate(self.streams)}
        if set(prior) != set(self.streams):
            raise ValueError(f"prior is of {', '.join(prior)}; expected {', '.join(self.streams)}")
        self.prior = np.array([float(prior[s]) for s in self.streams])
        if not (self.prior >= 0).all() or not math.isclose(self.prior.sum(), 1.0, abs_tol=1e-6):
            raise ValueError(f"prior is {prior}; its weights must not be negative and must add up to 1")
        self.kappa = kappa_of(criterion, kappa)
        self.criterion = criterion
        self.moment_decay, self.prior_sd = checked_memory(moment_decay, prior_sd)
        self.probes = 0
        self.ignored = 0
        self.last_ignored = ""
        self._kept: list[list[float]] = []  # scaled triangles of C and D, the newest last
        self._log_scale = 0.0
        self._weights: Array | None = None
        self._bands: Array | None = None

    # ------------------------------------------------------------------ one probe

    def update(self, grams: Grams) -> None:
        """Takes in one probe. A probe without information changes nothing but `ignored` and `last_ignored`:
        non-finite numbers, or streams that agree entirely (D = 0). Raises ValueError for other streams than its own,
        and for a negative square."""
        if grams.streams != self.streams:
            raise ValueError(f"the probe is of {', '.join(grams.streams)}; expected {', '.join(self.streams)}")
        C, D = grams.triangles()
        values = [float(v) for v in (*C, *D)]
        if not all(math.isfinite(v) for v in values):
            self._ignore(f"not finite: C = {C}, D = {D}")
            return
        squares = [grams.C[j][j] for j in range(len(grams.C))] + [grams.D[j][j] for j in range(len(grams.D))]
        if min(squares) < 0:
            raise ValueError(f"C is {grams.C}, D is {grams.D}; squared norms cannot be negative")
        apart = sum(squares[len(grams.C) :]) / len(grams.D)
        if apart < sys.float_info.min:
            self._ignore("the streams' gradients are equal (D = 0), so that their weights have no effect")
            return
        log_D = math.log(apart)
        if not self._kept:
            self._log_scale = log_D
        scale = math.exp(max(self._log_scale, log_D - MAX_LOG_STEP))
        scaled = [v / scale for v in values]
        if not all(math.isfinite(v * v) for v in scaled):
            self._ignore(f"out of range: C = {C}, D = {D}")
            return
        self._kept = [*self._kept, scaled][-_KEPT:]
        self.probes += 1
        # As alpha's: the mean of the logs, with a gain that corrects for the averages' empty start.
        gain = (1 - self.moment_decay) / (1 - self.moment_decay**self.probes)
        self._log_scale += gain * min(max(log_D - self._log_scale, -MAX_LOG_STEP), MAX_LOG_STEP)
        self._weights = self._bands = None

    def _ignore(self, reason: str) -> None:
        self.ignored += 1
        self.last_ignored = reason

    # ------------------------------------------------------------------ what the probes say

    @property
    def effective_probes(self) -> float:
        """Number of equally weighted probes whose mean would be as precise as the averages."""
        return float(1 / (self._shares() ** 2).sum()) if self._kept else 0.0

    def _shares(self) -> Array:
        """Weight of each kept probe [n], adding up to 1."""
        ages = np.arange(len(self._kept) - 1, -1, -1.0)
        shares = self.moment_decay**ages
        return shares / shares.sum()

    def _halves(self, shares: Array) -> Array:
        """The probes' weights with halves of them nearly left out [126, n]. Any two of the 63 columns of signs are
        balanced; a probe keeps its column, and probes that share one are left out together."""
        column = np.arange(self.probes - len(shares), self.probes) % 63
        tilt = _TILT * _SIGNS[:, column]
        tilted = shares * (1 + np.concatenate([tilt, -tilt]))
        return tilted / tilted.sum(1, keepdims=True)

    def _matrices(self, values: Array) -> tuple[Array, Array]:
        """C and B [.., k, k] of triangles [.., k²], as they are; B's first row and column are 0."""
        k = len(self.streams)
        C, D = np.zeros((*values.shape[:-1], k, k)), np.zeros((*values.shape[:-1], k, k))
        for place, (i, j) in enumerate(pairs_of(range(k))):
            C[..., i, j] = C[..., j, i] = values[..., place]
        for place, (i, j) in enumerate(pairs_of(range(1, k)), start=k * (k + 1) // 2):
            D[..., i, j] = D[..., j, i] = values[..., place]
        return C, D - (C - C[..., :1] - C[..., :1, :] + C[..., :1, :1])

    def clipped_weights(self, values: Array) -> Array:
        """w [R, k] of averaged triangles [R, k²] with negative eigenvalues of B and C as 0: MATH.md §5 as it stands."""
        C, B = self._matrices(values)
        return simplex_minimum(nearest_psd(B) + self.kappa * nearest_psd(C))

    def expected_weights(self, values: Array, spread: Array) -> Array:
        """The same with B's eigenvalues as they are to be expected, where `spread` [(k−1)², (k−1)²] is the error
        matrix of B's entries without its first row and column."""
        C, B = self._matrices(values)
        eigenvalues, vectors = np.linalg.eigh(B[:, 1:, 1:])
        along = np.einsum("rai,rbi->riab", vectors, vectors).reshape(*eigenvalues.shape, -1)
        error = np.sqrt(np.maximum(np.einsum("rim,mn,rin->ri", along, spread, along), 0.0))
        eigenvalues = expected_if_not_negative(eigenvalues, error)
        B[:, 1:, 1:] = np.einsum("rai,ri,rbi->rab", vectors, eigenvalues, vectors)
        return simplex_minimum(B + self.kappa * nearest_psd(C))

    def _evidence(self) -> _Evidence | None:
        """What the kept probes say together; None without evidence."""
        dof = self.effective_probes - 1
        if self.probes < 2 or dof <= 0:
            return None  # one probe shows no spread
        shares, kept = self._shares(), np.array(self._kept)
        mean = shares @ kept
        C, B = self._matrices(mean)
        apart = np.trace(nearest_psd(B)) + self.kappa * (np.trace(C) + len(C) * C[0, 0] - 2 * C[0].sum())
        if apart <= _TINY:
            return None
        widening = small_sample_widening(dof) * math.sqrt((dof + 1) / dof) / _TILT
        return _Evidence(shares, kept, mean, self._halves(shares) @ kept, dof, widening)

    def _solved(self) -> Array:
        """The weights [k], solved once a probe."""
        if self._weights is None:
            evidence = self._evidence()
            # Every rank solves for itself; linear algebra on another kind of CPU differs in the last bits.
            self._weights = self.prior if evidence is None else self._shrunk(evidence).round(12)
        return self._weights

    def _shrunk(self, evidence: _Evidence) -> Array:
        each = self._matrices(evidence.kept)[1][:, 1:, 1:].reshape(len(evidence.kept), -1)
        away = each - evidence.shares @ each
        spread = np.einsum("n,na,nb->ab", evidence.shares, away, away) / evidence.dof
        weights = self.expected_weights(evidence.mean[None], spread)[0]
        apart_sq = ((self.expected_weights(evidence.halves, spread) - weights) ** 2).mean(0)
        # For two streams this is alpha's: both weights have the same error.
        error_sq = evidence.widening**2 * apart_sq.sum() / 2
        trust = self.prior_sd**2 / (self.prior_sd**2 + error_sq)
        return self.prior + trust * (weights - self.prior)

    def _ends(self) -> Array:
        """The bands [k, 2], solved once a probe."""
        if self._bands is None:
            evidence, weights = self._evidence(), self._solved()
            if evidence is None:
                self._bands = np.tile([0.0, 1.0], (len(self.streams), 1))
            else:
                middle = self.clipped_weights(evidence.mean[None])[0]
                ends = np.quantile(self.clipped_weights(evidence.halves), [0.0228, 0.9772], axis=0)
                low, high = middle + evidence.widening * (ends - middle)
                self._bands = np.stack([np.minimum(low, weights), np.maximum(high, weights)], 1).clip(0.0, 1.0)
        return self._bands

    def _named(self, values: Array) -> dict[str, float]:
        return {s: float(v) for s, v in zip(self.streams, values, strict=True)}

    @property
    def weights(self) -> dict[str, float]:
        """Weights for the steps after the last probe; not negative, and 1 together."""
        return self._named(self._solved())

    @property
    def bands(self) -> dict[str, tuple[float, float]]:
        """For each weight what the probes do not contradict at two standard errors."""
        return {s: (float(low), float(high)) for s, (low, high) in zip(self.streams, self._ends(), strict=True)}

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors: half a weight's root mean square distance from the ends of its band. `prior_sd` without
        evidence."""
        if self._evidence() is None:
            return dict.fromkeys(self.streams, self.prior_sd)
        return self._named(np.sqrt(((self._ends() - self._solved()[:, None]) ** 2).mean(1)) / 2)

    def log_numbers(self, grams: Grams) -> dict[str, float]:
        """A probe's own numbers and the bands after it, by the names of the log."""
        k, names = len(self.streams), self.streams
        found = {f"gram/C_{names[i]}_{names[j]}": grams.C[i][j] for i, j in pairs_of(range(k))}
        found |= {f"gram/D_{names[i + 1]}_{names[j + 1]}": grams.D[i][j] for i, j in pairs_of(range(k - 1))}
        stderr = self.stderr
        for name, (low, high) in self.bands.items():
            found |= {f"weight/{name}/low": low, f"weight/{name}/high": high, f"weight/{name}/stderr": stderr[name]}
        return found

    def summary(self) -> str:
        """One line in words for the end of a run; +- is one standard error."""
        ignored = f"; {self.ignored} probes ignored, the last because {self.last_ignored}" if self.ignored else ""
        if self._evidence() is None:
            stayed = ", ".join(f"{s} {v:.2f}" for s, v in self._named(self.prior).items())
            return f"the weights stayed at their prior ({stayed}): {self.probes} probes are no evidence{ignored}"
        settled = ", ".join(f"{s} {w:.2f} ± {self.stderr[s]:.2f}" for s, w in self.weights.items())
        noise = np.diag(self._matrices(self._shares() @ np.array(self._kept))[0])
        first = self.streams[0]
        words = [
            f"{noise[0] / v:.1f} times the noise of the {name} one" if v > 0 else f"noise where the {name} one has none"
            for name, v in zip(self.streams[1:], noise[1:], strict=True)
        ]
        return f"the weights settled at {settled}: the {first} gradient carries {' and '.join(words)}{ignored}"

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The evidence as JSON-able numbers (exact through JSON). Settings are not part of it: prior, criterion
        and kappa may change between runs and read the same evidence."""
        return {
            "streams": list(self.streams),
            "probes": self.probes,
            "ignored": self.ignored,
            "last_ignored": self.last_ignored,
            "log_scale": self._log_scale,
            "kept": [list(values) for values in self._kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises ValueError if it is not whole, or of other streams; then nothing
        has changed."""
        if set(state) != set(self.state_dict()):
            raise ValueError(f"state of the weights has {sorted(state)}; expected {sorted(self.state_dict())}")
        if tuple(state["streams"]) != self.streams:
            raise ValueError(
                f"state of the weights is of the streams {', '.join(state['streams'])}; expected "
                f"{', '.join(self.streams)}"
            )
        kept = [[float(v) for v in values] for values in state["kept"]]
        probes, log_scale = int(state["probes"]), float(state["log_scale"])
        if any(len(values) != len(self.streams) ** 2 for values in kept) or len(kept) != min(probes, _KEPT):
            raise ValueError(f"state of the weights has {len(kept)} probes of {probes}, or not all of their numbers")
        if not all(math.isfinite(v) for values in [*kept, [log_scale]] for v in values):
            raise ValueError("state of the weights holds numbers that are not finite")
        self.probes, self.ignored = probes, int(state["ignored"])
        self.last_ignored = str(state["last_ignored"])
        self._kept, self._log_scale = kept, log_scale
        self._weights = self._bands = None
