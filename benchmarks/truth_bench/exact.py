"""The true moments of one policy, by summing over every prompt, trace and answer. float64.

Shapes as in model.py, with J = R * Y joint (trace, answer) states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from truth_bench.model import Array, Task


@dataclass(frozen=True)
class Truth:
    """Means [P] of the gradients and, in squared gradient units, the variances of one pair's gradient."""

    mu: Array
    mean_t: Array
    mean_e: Array
    var_t: float
    var_e: float
    cov: float

    def at(self, pairs: int) -> TrueMoments:
        """Moments of the mean gradient over `pairs` independent pairs."""
        b_t, b_e = self.mean_t - self.mu, self.mean_e - self.mu
        return TrueMoments(
            bias_t_sq=float(b_t @ b_t),
            bias_e_sq=float(b_e @ b_e),
            bias_dot=float(b_t @ b_e),
            V_t=self.var_t / pairs,
            V_e=self.var_e / pairs,
            C=self.cov / pairs,
        )


@dataclass(frozen=True)
class TrueMoments:
    """Squared biases and batch-mean variances (MATH: b_t, b_e, V_t, V_e, C), in squared gradient units."""

    bias_t_sq: float
    bias_e_sq: float
    bias_dot: float
    V_t: float
    V_e: float
    C: float

    @property
    def D(self) -> float:
        return self.bias_t_sq + self.bias_e_sq - 2 * self.bias_dot + self.W

    @property
    def X(self) -> float:
        return self.V_t - self.C

    @property
    def W(self) -> float:
        return self.V_t + self.V_e - 2 * self.C

    @property
    def alpha_circ(self) -> float:
        """What the estimator aims at: the optimum with b_t taken as 0."""
        return min(max(1 - self.X / self.D, 0.0), 1.0)

    @property
    def alpha_star(self) -> float:
        """The optimum."""
        raw = (self.V_e - self.C + self.bias_e_sq - self.bias_dot) / self.D
        return min(max(raw, 0.0), 1.0)

    def alpha_kappa(self, kappa: float) -> float:
        bias = max(self.D - self.W, 0.0)
        return min(max((bias + kappa * (self.W - self.X)) / (bias + kappa * self.W), 0.0), 1.0)

    def mse(self, alpha):
        """E|alpha g_t + (1 - alpha) g_e - mu|^2; alpha may be an array."""
        a, e = alpha, 1 - alpha
        bias = a**2 * self.bias_t_sq + e**2 * self.bias_e_sq + 2 * a * e * self.bias_dot
        return bias + a**2 * self.V_t + e**2 * self.V_e + 2 * a * e * self.C


def _scores(task: Task, theta_P: Array) -> tuple[Array, Array, Array, Array]:
    """Gradients of log pi(r, y | x) [X, R, Y, P] and log pi(y | x, empty) [X, Y, P], and those log-probs."""
    _, letters_SXCK = task._trace_logps(theta_P[None])
    p_XCK = np.exp(letters_SXCK[0])
    visits_RC = task.counts_RCK.sum(-1)
    U_XRCK = task.counts_RCK - visits_RC[None, :, :, None] * p_XCK[:, None]
    A_XRFK = task.u_XF[:, None, :, None] * U_XRCK.sum(2)[:, :, None, :]
    joint_XRY, empty_XY = task.logps(theta_P)
    M_QY = task.split(theta_P[None])[2][0]
    answer_XRY = np.exp(joint_XRY - task._trace_logps(theta_P[None])[0][0][:, :, None])
    eye = np.eye(task.config.answers)
    M_XRYQY = task.phi_XRQ[:, :, None, :, None] * (eye - answer_XRY[:, :, None, :])[:, :, :, None, :]
    X, R, Y = joint_XRY.shape
    trace = np.concatenate([A_XRFK.reshape(X, R, -1), U_XRCK.reshape(X, R, -1)], -1)
    trace = np.broadcast_to(trace[:, :, None], (X, R, Y, trace.shape[-1]))
    joint = np.concatenate([trace, M_XRYQY.reshape(X, R, Y, -1)], -1)
    M_XYQY = task.phi_empty_XQ[:, None, :, None] * (eye - np.exp(empty_XY)[:, None, :])[:, :, None, :]
    zeros = np.zeros((X, Y, trace.shape[-1]))
    assert M_QY.size == task.sizes[2]
    return joint, np.concatenate([zeros, M_XYQY.reshape(X, Y, -1)], -1), joint_XRY, empty_XY


def _weights(beta: float, gain: Array) -> Array:
    """-d/d(gain_i - gain_j) of the DPO loss, [.., i, j]: its size, positive."""
    return beta / (1 + np.exp(beta * (gain[..., :, None] - gain[..., None, :])))


def truth(task: Task, theta_P: Array) -> Truth:
    """True gradient of the marginal loss, and the first two moments of one pair's two gradients."""
    beta = task.config.beta
    joint_score, empty_score, joint_XRY, empty_XY = _scores(task, theta_P)
    X, R, Y = joint_XRY.shape
    J = R * Y
    P = theta_P.size

    posterior_XRY = np.exp(joint_XRY - np.log(np.exp(joint_XRY).sum(1, keepdims=True)))
    marginal_score = np.einsum("xry,xryp->xyp", posterior_XRY, joint_score)
    marginal_gain = np.log(np.exp(joint_XRY).sum(1)) - task.ref_marginal_XY
    weight = task.pairs_XYY * _weights(beta, marginal_gain)
    mu = -np.einsum("xij,xip->p", weight - weight.transpose(0, 2, 1), marginal_score) / X

    weight = task.empty_pairs_XYY if task.config.empty_answers == "own" else task.pairs_XYY
    empty_size_XYY = _weights(beta, empty_XY - task.ref_empty_XY)
    mean_e_XP = -np.einsum("xij,xijp->xp", weight * empty_size_XYY, _differences(empty_score))
    second_e = (weight * empty_size_XYY**2 * (_differences(empty_score) ** 2).sum(-1)).sum((1, 2))

    mean_t_XP, second_t, cross = np.zeros((X, P)), np.zeros(X), np.zeros(X)
    for x in range(X):
        score_JP = joint_score[x].reshape(J, P)
        gain = (joint_XRY[x] - task.ref_joint_XRY[x]).reshape(J)
        posterior_J = task.q_trace_given_XYR[x].T.reshape(J)
        y = np.tile(np.arange(Y), R)
        pair_JJ = posterior_J[:, None] * posterior_J[None, :] * task.pairs_XYY[x][y[:, None], y[None, :]]
        size_JJ = _weights(beta, gain)
        weight_JJ = pair_JJ * size_JJ
        mean_t_XP[x] = -(weight_JJ.sum(1) - weight_JJ.sum(0)) @ score_JP
        gram = score_JP @ score_JP.T
        norm = np.diag(gram)
        second_t[x] = (pair_JJ * size_JJ**2 * (norm[:, None] + norm[None, :] - 2 * gram)).sum()
        if task.config.empty_answers == "strip":
            difference = _differences(empty_score[x]) * empty_size_XYY[x][..., None]
            along_JYY = np.einsum("jp,abp->jab", score_JP, difference)
            ab = along_JYY[:, y, :][np.arange(J), np.arange(J)]  # [J, Y]: preferred answer is j's own
            ba = along_JYY[:, :, y][np.arange(J), :, np.arange(J)]  # [J, Y]: rejected answer is j's own
            cross[x] = (weight_JJ * (ab[:, y] - ba[:, y].T)).sum()
        else:
            cross[x] = mean_t_XP[x] @ mean_e_XP[x]

    mean_t, mean_e = mean_t_XP.mean(0), mean_e_XP.mean(0)
    return Truth(
        mu=mu,
        mean_t=mean_t,
        mean_e=mean_e,
        var_t=float(second_t.mean() - mean_t @ mean_t),
        var_e=float(second_e.mean() - mean_e @ mean_e),
        cov=float(cross.mean() - mean_t @ mean_e),
    )


def _differences(score: Array) -> Array:
    """score_i - score_j, [.., Y, P] -> [.., Y, Y, P]."""
    return score[..., :, None, :] - score[..., None, :, :]


def smoothness(task: Task, theta_P: Array, steps: int = 30) -> float:
    """Largest eigenvalue of the marginal loss's Hessian (power iteration on exact gradients)."""
    v = np.random.default_rng(0).normal(size=theta_P.size)
    size = 0.0
    for _ in range(steps):
        v /= np.linalg.norm(v)
        step = 1e-4 * v
        v = (truth(task, theta_P + step).mu - truth(task, theta_P - step).mu) / 2e-4
        size = float(np.linalg.norm(v))
    return size
