"""Three streams of the bench's model: their true moments, and samples of them.

Streams are trace, empty and short, in the program's order. With `own` answers each stream has pairs of its own for
the same prompts; with `strip` all have the trace pair's answers, and a short trace is the beginning of its trace.

Shapes as in model.py and exact.py; k = 3 streams, N states of one stream (trace and answer, or answer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bvpo.gradients.grams import Grams
from truth_bench.exact import _scores, _weights, truth
from truth_bench.model import Array, Batch, Task

STREAMS = ("trace", "empty", "short")


@dataclass(frozen=True)
class StreamsTruth:
    """True gradient [P], the streams' means [k, P], and covariances of one row's gradients [k, k]."""

    mu_P: Array
    mean_kP: Array
    one_row_kk: Array

    def criterion_matrix(self, rows: int, kappa: float, *, centred: bool = False) -> Array:
        """M [k, k] of a batch of `rows`: ⟨b_j, b_k⟩ + κ·tr Cov. `centred`: b_1 taken as 0, as the estimator does."""
        bias_kP = self.mean_kP - (self.mean_kP[0] if centred else self.mu_P)
        return bias_kP @ bias_kP.T + kappa * self.one_row_kk / rows


def streams_truth(task: Task, short: Task, theta_P: Array) -> StreamsTruth:
    """By summing over every prompt and every two states; float64."""
    strip = task.config.empty_answers == "strip"
    beta, Y = task.config.beta, task.config.answers
    full_score, empty_score, joint_XRY, empty_XY = _scores(task, theta_P)
    short_score, _, short_XRY, _ = _scores(short, theta_P)
    means, seconds = np.zeros((3, theta_P.size)), np.zeros((3, 3))
    for x in range(task.config.prompts):
        full = _states(full_score[x], joint_XRY[x] - task.ref_joint_XRY[x], _pairs_of_states(task, x))
        brief = _states(short_score[x], short_XRY[x] - short.ref_joint_XRY[x], _pairs_of_states(short, x))
        empty = (empty_score[x], empty_XY[x] - task.ref_empty_XY[x], task.empty_pairs_XYY[x])
        if strip:
            r, y = np.divmod(np.arange(full[0].shape[0]), Y)
            prefix = r // task.config.letters ** (task.config.length - task.config.short)
            empty = (empty[0][y], empty[1][y], full[2])
            state = prefix * Y + y
            brief = (brief[0][state], brief[1][state], full[2])
        streams = [(score, pair, _weights(beta, gain)) for score, gain, pair in (full, empty, brief)]
        here = np.array([-((pair * size).sum(1) - (pair * size).sum(0)) @ score for score, pair, size in streams])
        means += here / task.config.prompts
        for j in range(3):
            for k in range(3):
                if j == k or strip:
                    (score, pair, size), (other, _, other_size) = streams[j], streams[k]
                    seconds[j, k] += _second(pair * size * other_size, score @ other.T) / task.config.prompts
                else:
                    seconds[j, k] += here[j] @ here[k] / task.config.prompts
    return StreamsTruth(truth(task, theta_P).mu, means, seconds - means @ means.T)


def _states(score_RYP: Array, gain_RY: Array, pair_NN: Array) -> tuple[Array, Array, Array]:
    return score_RYP.reshape(-1, score_RYP.shape[-1]), gain_RY.reshape(-1), pair_NN


def _pairs_of_states(task: Task, x: int) -> Array:
    """P(preferred, rejected) [N, N] over (trace, answer) states."""
    R, Y = task.q_XRY.shape[1:]
    posterior = task.q_trace_given_XYR[x].T.reshape(R * Y)
    y = np.tile(np.arange(Y), R)
    return posterior[:, None] * posterior[None, :] * task.pairs_XYY[x][y[:, None], y[None, :]]


def _second(weight_NN: Array, gram_NN: Array) -> float:
    """Σ weight_ij·⟨s_i − s_j, u_i − u_j⟩ with gram = ⟨s_i, u_j⟩."""
    own = np.diag(gram_NN)
    return float((weight_NN * (own[:, None] + own[None, :] - gram_NN - gram_NN.T)).sum())


def sample_short(task: Task, short: Task, rng: np.random.Generator, batch: Batch) -> Batch:
    """The short stream's pairs of `batch`'s prompts."""
    if task.config.empty_answers == "own":
        return short.sample_for(rng, batch.x)
    letters = task.config.letters ** (task.config.length - task.config.short)
    plus, minus = batch.r_plus // letters, batch.r_minus // letters
    return Batch(batch.x, batch.plus, batch.minus, plus, minus, batch.e_plus, batch.e_minus)


def half_gradients(task: Task, short: Task, theta_SP: Array, batch: Batch, short_batch: Batch, n_first: int) -> Array:
    """Mean gradients [S, k, 2, P] of the halves."""
    trace, empty = task.half_gradients(theta_SP, batch, n_first)
    brief, _ = short.half_gradients(theta_SP, short_batch, n_first)
    return np.stack([trace, empty, brief], 1)


def gram_triangles(g_SkhP: Array, n_first: int, rows: int) -> Array:
    """Upper triangles of Ĉ and of D̂ [S, k(k+1)/2 + k(k−1)/2] (MATH.md section 5, no row lost)."""
    k = g_SkhP.shape[1]
    share = np.array([n_first, rows - n_first]) / rows
    apart = g_SkhP[:, :, 0] - g_SkhP[:, :, 1]
    mean = np.einsum("h,skhp->skp", share, g_SkhP)
    gap = mean[:, 1:] - mean[:, :1]
    C = share[0] * share[1] * np.einsum("sjp,skp->sjk", apart, apart)
    D = np.einsum("sjp,skp->sjk", gap, gap)
    return np.concatenate([C[:, *np.triu_indices(k)], D[:, *np.triu_indices(k - 1)]], 1)


def grams(triangles: Array) -> Grams:
    """One probe as the estimator takes it."""
    six = len(STREAMS) * (len(STREAMS) + 1) // 2
    return Grams.of_triangles(STREAMS, [float(v) for v in triangles[:six]], [float(v) for v in triangles[six:]])


def part_of(whole: Grams, streams: tuple[str, ...]) -> Grams:
    """The probe of some of its streams, the first among them."""
    at = [whole.streams.index(s) for s in streams]
    C = tuple(tuple(whole.C[i][j] for j in at) for i in at)
    return Grams(streams, C, tuple(tuple(whole.D[i - 1][j - 1] for j in at[1:]) for i in at[1:]))
