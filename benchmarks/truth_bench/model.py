"""A reasoning model whose traces can be enumerated, its preference pairs and its gradients. float64 numpy.

A prompt x is a feature vector. A trace r is `length` letters, drawn one after the other from
softmax(u_x A + U[previous letter]); an answer y is drawn from softmax(phi(x, r) M). With an empty trace phi(x, r)
becomes phi_empty(x). Pairs come from a fixed sampler (the reference policy): two (trace, answer) draws with
different answers, ranked by a Bradley-Terry judge who sees the answers only. The empty stream has its own answers,
drawn without a trace and ranked apart (`own`), or the trace pair's answers (`strip`).

Shapes: S runs, N pairs, X prompts, R traces, K letters, C = K + 1 previous letters (the last one: start),
Y answers, F prompt features, Q answer features, P parameters (A, U, M flat), h = 2 halves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TaskConfig:
    """Attributes:
    length, letters, answers, prompts: sizes.
    trace_scale: spread of the trace logits; small means traces near uniform, so noisy.
    trace_effect: how much the answer depends on the trace.
    empty_offset: 0 puts the empty trace's features at the mean over traces, 1 somewhere else entirely.
    prompt_spread: how different prompts are from each other.
    empty_answers: `own` or `strip`.
    judge: scale of the rewards; large means labels without noise.
    short: letters of the shortened stream's traces.
    short_offset: how far its features lie off the right ones, as a part of the way of the empty stream's.
    """

    length: int = 3
    letters: int = 3
    answers: int = 4
    prompts: int = 8
    trace_scale: float = 1.0
    trace_effect: float = 1.0
    empty_offset: float = 0.5
    prompt_spread: float = 1.0
    empty_answers: str = "own"
    judge: float = 2.0
    beta: float = 0.5
    features: int = 4
    hidden: int = 5
    seed: int = 0
    short: int = 1
    short_offset: float = 0.5


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Task:
    """The fixed tables of one task: features, sampler, reference and pair distributions."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = c = config
        rng = np.random.default_rng(c.seed)
        K, F = c.letters, c.features
        shared, own = rng.normal(size=F), rng.normal(size=(c.prompts, F))
        self.u_XF = (shared + c.prompt_spread * own) / np.sqrt(F)

        traces = list(product(range(K), repeat=c.length))
        self.counts_RCK = _counts(traces, K)
        self._mixing = rng.normal(size=(F + 2 * K, c.hidden))
        self.phi_XRQ = self._features(self.counts_RCK, traces)
        self.shapes = ((F, K), (K + 1, K), (self.phi_XRQ.shape[-1], c.answers))
        self.sizes = [a * b for a, b in self.shapes]

        A = c.trace_scale * rng.normal(size=self.shapes[0])
        U = c.trace_scale * rng.normal(size=self.shapes[1])
        M = 0.7 * rng.normal(size=self.shapes[2])
        self.theta_ref_P = np.concatenate([A.ravel(), U.ravel(), M.ravel()])
        self.reward_XY = c.judge * rng.normal(size=(c.prompts, c.answers))

        trace_XR, _ = self._trace_logps(self.theta_ref_P[None])
        mean_phi_XQ = np.einsum("xr,xrq->xq", np.exp(trace_XR[0]), self.phi_XRQ)
        self._elsewhere_XQ = rng.normal(size=mean_phi_XQ.shape) * np.abs(mean_phi_XQ).mean()
        self.phi_empty_XQ = (1 - c.empty_offset) * mean_phi_XQ + c.empty_offset * self._elsewhere_XQ
        self._set_sampler()

    def _features(self, counts_RCK: Array, traces: list[tuple[int, ...]]) -> Array:
        """phi [X, R, Q] of the given traces."""
        c, X, R = self.config, self.config.prompts, len(traces)
        histogram_RK = counts_RCK.sum(1) / len(traces[0])
        last_RK = np.eye(c.letters)[[t[-1] for t in traces]]
        u_XRF = np.broadcast_to(self.u_XF[:, None], (X, R, c.features))
        about_trace = c.trace_effect * np.concatenate([histogram_RK, last_RK], -1)
        about_XR = np.broadcast_to(about_trace, (X, R, 2 * c.letters))
        hidden = np.tanh(np.concatenate([u_XRF, about_XR], -1) @ self._mixing)
        return np.concatenate([u_XRF, about_XR, hidden], -1)

    def shortened(self) -> Task:
        """The same policy where a trace stops after `short` letters: its own features, sampler, answers and pairs.

        Its features lie off those of the letters that it has, in the direction of the empty stream's.
        """
        c, short = self.config, copy.copy(self)
        traces = list(product(range(c.letters), repeat=c.short))
        short.counts_RCK = _counts(traces, c.letters)
        away = c.short_offset * c.empty_offset
        phi_XRQ = self._features(short.counts_RCK, traces)
        short.phi_XRQ = (1 - away) * phi_XRQ + away * self._elsewhere_XQ[:, None]
        short._set_sampler()
        return short

    def _set_sampler(self) -> None:
        """Reference log-probs, what the sampler draws, and its pairs."""
        X = self.config.prompts
        joint_XRY, empty_XY = self.logps(self.theta_ref_P)
        self.ref_joint_XRY, self.ref_empty_XY = joint_XRY, empty_XY
        self.q_XRY = np.exp(joint_XRY)
        self.q_trace_given_XYR = (self.q_XRY / self.q_XRY.sum(1, keepdims=True)).transpose(0, 2, 1)
        self.pairs_XYY = self._pair_distribution(self.q_XRY.sum(1))
        self.empty_pairs_XYY = self._pair_distribution(np.exp(empty_XY))
        self.ref_marginal_XY = np.log(self.q_XRY.sum(1))
        self._cdf_pairs = _cdf(self.pairs_XYY.reshape(X, -1))
        self._cdf_empty = _cdf(self.empty_pairs_XYY.reshape(X, -1))
        self._cdf_trace = _cdf(self.q_trace_given_XYR)

    def _pair_distribution(self, answer_XY: Array) -> Array:
        """P(preferred y, rejected y | x) of two draws with different answers."""
        preferred = 1 / (1 + np.exp(self.reward_XY[:, None, :] - self.reward_XY[:, :, None]))
        weight = answer_XY[:, :, None] * answer_XY[:, None, :] * preferred * (1 - np.eye(answer_XY.shape[1]))
        return weight / weight.sum((1, 2), keepdims=True)

    def split(self, theta_SP: Array) -> list[Array]:
        """A [S, F, K], U [S, C, K], M [S, Q, Y]."""
        parts = np.split(theta_SP, np.cumsum(self.sizes)[:-1], axis=-1)
        return [p.reshape(*theta_SP.shape[:-1], *s) for p, s in zip(parts, self.shapes, strict=True)]

    def _trace_logps(self, theta_SP: Array) -> tuple[Array, Array]:
        """log pi(r | x) [S, X, R] and the letters' log-probabilities [S, X, C, K]."""
        A_SFK, U_SCK, _ = self.split(theta_SP)
        letters_SXCK = log_softmax((self.u_XF @ A_SFK)[:, :, None, :] + U_SCK[:, None])
        S, X = letters_SXCK.shape[:2]
        logp = letters_SXCK.reshape(S, X, -1) @ self.counts_RCK.reshape(len(self.counts_RCK), -1).T
        return logp, letters_SXCK

    def logps(self, theta_P: Array) -> tuple[Array, Array]:
        """log pi(r, y | x) [X, R, Y] and log pi(y | x, empty) [X, Y] of one parameter vector."""
        trace_SXR, _ = self._trace_logps(theta_P[None])
        M_QY = self.split(theta_P[None])[2][0]
        return trace_SXR[0][:, :, None] + log_softmax(self.phi_XRQ @ M_QY), log_softmax(self.phi_empty_XQ @ M_QY)

    def marginal_loss(self, theta_SP: Array) -> Array:
        """L_m [S]: DPO on pi(y | x) = sum_r pi(r, y | x), over the trace stream's pairs; exact."""
        trace_SXR, _ = self._trace_logps(theta_SP)
        M_SQY = self.split(theta_SP)[2]
        joint = trace_SXR[..., None] + log_softmax(np.einsum("xrq,sqy->sxry", self.phi_XRQ, M_SQY, optimize=True))
        top = joint.max(2, keepdims=True)
        marginal_SXY = np.log(np.exp(joint - top).sum(2)) + top[:, :, 0]
        gain = marginal_SXY - self.ref_marginal_XY
        margin = self.config.beta * (gain[..., :, None] - gain[..., None, :])
        return (np.logaddexp(0, -margin) * self.pairs_XYY).sum((2, 3)).mean(1)

    def sample(self, rng: np.random.Generator, runs: int, pairs: int) -> Batch:
        """Fresh pairs for each run."""
        return self.sample_for(rng, rng.integers(self.config.prompts, size=(runs, pairs)))

    def sample_for(self, rng: np.random.Generator, x: NDArray) -> Batch:
        """Fresh pairs of the given prompts."""
        Y = self.config.answers
        yy = _draw(rng, self._cdf_pairs[x])
        plus, minus = yy // Y, yy % Y
        r_plus, r_minus = (_draw(rng, self._cdf_trace[x, y]) for y in (plus, minus))
        own = _draw(rng, self._cdf_empty[x])
        ee = yy if self.config.empty_answers == "strip" else own
        return Batch(x, plus, minus, r_plus, r_minus, ee // Y, ee % Y)

    def half_gradients(self, theta_SP: Array, batch: Batch, n_first: int) -> tuple[Array, Array]:
        """Mean gradients [S, 2, P] of the trace and the empty loss over the first n_first pairs and the rest."""
        N = batch.x.shape[1]
        half_NH = np.zeros((N, 2))
        half_NH[:n_first, 0], half_NH[n_first:, 1] = 1 / n_first, 1 / (N - n_first)
        return self._trace_gradient(theta_SP, batch, half_NH), self._empty_gradient(theta_SP, batch, half_NH)

    def _trace_gradient(self, theta_SP: Array, batch: Batch, half_NH: Array) -> Array:
        _, letters_SXCK = self._trace_logps(theta_SP)
        M_SQY = self.split(theta_SP)[2]
        run = np.arange(len(theta_SP))[:, None]
        letters_SNCK = letters_SXCK[run, batch.x]
        p_SNCK = np.exp(letters_SNCK)
        sides, gain = [], 0.0
        for sign, r, y in ((1, batch.r_plus, batch.plus), (-1, batch.r_minus, batch.minus)):
            counts_SNCK = self.counts_RCK[r]
            phi_SNQ = self.phi_XRQ[batch.x, r]
            answer_SNY = log_softmax(phi_SNQ @ M_SQY)
            logp = (counts_SNCK * letters_SNCK).sum((2, 3)) + np.take_along_axis(answer_SNY, y[..., None], 2)[..., 0]
            gain = gain + sign * (logp - self.ref_joint_XRY[batch.x, r, y])
            rest_SNCK = counts_SNCK - counts_SNCK.sum(-1, keepdims=True) * p_SNCK
            rest_SNY = np.eye(self.config.answers)[y] - np.exp(answer_SNY)
            sides.append((sign, rest_SNCK, phi_SNQ, rest_SNY))
        weight_SHN = self._pair_weight(gain)[:, None, :] * half_NH.T
        u_SNF = self.u_XF[batch.x]
        rest_SNCK = sum(sign * rest for sign, rest, _, _ in sides)
        S, N = batch.x.shape
        gA = np.einsum("shn,snf,snk->shfk", weight_SHN, u_SNF, rest_SNCK.sum(2), optimize=True)
        gU = weight_SHN @ rest_SNCK.reshape(S, N, -1)
        gM = sum(s * np.einsum("shn,snq,sny->shqy", weight_SHN, p, e, optimize=True) for s, _, p, e in sides)
        return np.concatenate([gA.reshape(S, 2, -1), gU, gM.reshape(S, 2, -1)], -1)

    def _empty_gradient(self, theta_SP: Array, batch: Batch, half_NH: Array) -> Array:
        M_SQY = self.split(theta_SP)[2]
        phi_SNQ = self.phi_empty_XQ[batch.x]
        answer_SNY = log_softmax(phi_SNQ @ M_SQY)
        difference = answer_SNY - self.ref_empty_XY[batch.x]
        pick = np.eye(self.config.answers)[batch.e_plus] - np.eye(self.config.answers)[batch.e_minus]
        weight_SHN = self._pair_weight((difference * pick).sum(-1))[:, None, :] * half_NH.T
        # Both answers share phi, so the softmax terms of the two scores cancel.
        gM = np.einsum("shn,snq,sny->shqy", weight_SHN, phi_SNQ, pick, optimize=True)
        zeros = np.zeros((*gM.shape[:2], self.sizes[0] + self.sizes[1]))
        return np.concatenate([zeros, gM.reshape(*gM.shape[:2], -1)], -1)

    def _pair_weight(self, gain: Array) -> Array:
        """d/d gain of -log sigmoid(beta * gain)."""
        beta = self.config.beta
        return -beta / (1 + np.exp(beta * gain))


@dataclass(frozen=True)
class Batch:
    """Indices [S, N]: prompt, answers and traces of the trace pair, answers of the empty pair."""

    x: NDArray
    plus: NDArray
    minus: NDArray
    r_plus: NDArray
    r_minus: NDArray
    e_plus: NDArray
    e_minus: NDArray

    def tile(self, times: int) -> Batch:
        """The same pairs for `times` blocks of runs."""
        return Batch(*(np.tile(v, (times, 1)) for v in vars(self).values()))


def _counts(traces: list[tuple[int, ...]], letters: int) -> Array:
    """How often a trace has each letter after each previous one [R, C, K]."""
    counts_RCK = np.zeros((len(traces), letters + 1, letters))
    for i, trace in enumerate(traces):
        for previous, letter in zip((letters, *trace), trace, strict=False):
            counts_RCK[i, previous, letter] += 1
    return counts_RCK


def _cdf(probabilities: Array) -> Array:
    return np.cumsum(probabilities, -1) / probabilities.sum(-1, keepdims=True)


def _draw(rng: np.random.Generator, cdf: Array) -> NDArray:
    return (rng.random((*cdf.shape[:-1], 1)) >= cdf[..., :-1]).sum(-1)
