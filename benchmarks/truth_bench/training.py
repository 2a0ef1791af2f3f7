"""Training with each way of choosing alpha: marginal loss over the run, on common random pairs.

Shapes: G arms (ways of choosing alpha), Z seeds, S = G * Z runs, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from truth_bench.exact import truth
from truth_bench.frozen import half_moments
from truth_bench.model import Array, Task
from truth_bench.regimes import Regime

KAPPAS = (1.0, 0.3, 0.1, 0.03, 0.01)
PROBE_INTERVAL, FIRST_PROBES = 10, 8
ORACLE_INTERVAL = 30  # enumerating every run's moments is most of the bench's cost


@dataclass(frozen=True)
class Arm:
    """One way of choosing alpha: `fixed`, an estimator's `settings`, or an `oracle` (`star`: alpha*, `circ`: α°)."""

    name: str
    fixed: float | None = None
    settings: dict | None = None
    oracle: str | None = None


FIXED = {"empty": 0.0, "fixed .25": 0.25, "half": 0.5, "fixed .75": 0.75, "trace": 1.0}


def arms() -> list[Arm]:
    """Fixed alphas, every criterion at the default memory, three at a longer one, and the oracle."""
    chosen = [Arm(name, fixed=value) for name, value in FIXED.items()]
    chosen.append(Arm("mse", settings={"criterion": "mse"}))
    chosen += [Arm(f"sgd {kappa:g}", settings={"criterion": "sgd", "kappa": kappa}) for kappa in KAPPAS]
    for kappa in (1.0, 0.3, 0.1):
        settings = {"criterion": "sgd", "kappa": kappa, "moment_decay": 0.97}
        chosen.append(Arm(f"sgd {kappa:g} decay .97", settings=settings))
    return [*chosen, Arm("oracle", oracle="star")]


def few_arms() -> list[Arm]:
    """The fixed alphas that are somebody's choice, and every criterion at the default memory."""
    wanted = {"half", "fixed .75", "trace", "mse", *(f"sgd {kappa:g}" for kappa in KAPPAS)}
    return [arm for arm in arms() if arm.name in wanted]


@dataclass(frozen=True)
class Training:
    """Marginal loss and alpha at the evaluated steps [G, Z, E]."""

    arms: list[Arm]
    steps: list[int]
    loss: Array
    alpha: Array

    def final(self, last: float = 0.1) -> Array:
        """Marginal loss [G, Z], averaged over the last tenth of the run: one step's is noisy."""
        window = max(int(len(self.steps) * last), 1)
        return self.loss[..., -window:].mean(-1)


class Adam:
    """Adam (arXiv 1412.6980) at beta 0.9 / 0.95, as LLM runs set it; `sgd` is the plain step."""

    def __init__(self, name: str, lr: float, shape: tuple[int, ...]) -> None:
        self.name, self.lr, self.count = name, lr, 0
        self.first, self.second = np.zeros(shape), np.zeros(shape)

    def step(self, gradient: Array) -> Array:
        if self.name == "sgd":
            return -self.lr * gradient
        self.count += 1
        self.first += 0.1 * (gradient - self.first)
        self.second += 0.05 * (gradient**2 - self.second)
        first, second = self.first / (1 - 0.9**self.count), self.second / (1 - 0.95**self.count)
        return -self.lr * first / (np.sqrt(second) + 1e-8)


def is_probe(step: int) -> bool:
    return step < FIRST_PROBES or step % PROBE_INTERVAL == 0


def train(
    regime: Regime,
    chosen: list[Arm],
    optimizer: str,
    lr: float,
    steps: int,
    seeds: int,
    evaluate_every: int = 10,
    cosine: bool = False,
    seed: int = 3,
) -> Training:
    """All arms and seeds side by side; the arms of one seed see the same pairs. `cosine` decays lr to 0; `seed`
    is of the pairs."""
    task = Task(regime.task)
    G = len(chosen)
    rng = np.random.default_rng(seed)
    theta_SP = np.tile(task.theta_ref_P, (G * seeds, 1))
    estimators = [AlphaEstimator(**a.settings) if a.settings else None for a in chosen for _ in range(seeds)]
    alpha_S = np.repeat([0.5 if a.fixed is None else a.fixed for a in chosen], seeds)
    adam = Adam(optimizer, lr, theta_SP.shape)
    share = np.array([regime.n_first, regime.pairs - regime.n_first]) / regime.pairs
    at, losses, alphas = [], [], []
    for step in range(steps + 1):
        if step % ORACLE_INTERVAL == 0:
            for g, arm in enumerate(chosen):
                if arm.oracle:  # alpha of the policy as it stands now: knows more than any lagged estimate
                    for run in range(g * seeds, (g + 1) * seeds):
                        true = truth(task, theta_SP[run]).at(regime.pairs)
                        alpha_S[run] = true.alpha_star if arm.oracle == "star" else true.alpha_circ
        if step % evaluate_every == 0:
            at.append(step)
            losses.append(task.marginal_loss(theta_SP))
            alphas.append(alpha_S.copy())
        if step == steps:
            break
        batch = task.sample(rng, seeds, regime.pairs).tile(G)
        g_t, g_e = task.half_gradients(theta_SP, batch, regime.n_first)
        mean_t, mean_e = (np.einsum("h,shp->sp", share, g) for g in (g_t, g_e))
        if cosine:
            adam.lr = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        update = adam.step(alpha_S[:, None] * mean_t + (1 - alpha_S[:, None]) * mean_e)
        if is_probe(step):
            for run, moments in enumerate(zip(*half_moments(g_t, g_e, regime.n_first, regime.pairs), strict=True)):
                if estimators[run] is not None:
                    estimators[run].update(Moments(*map(float, moments)))
                    alpha_S[run] = estimators[run].alpha
        theta_SP = theta_SP + update
    shape = (len(at), G, seeds)
    return Training(
        chosen,
        at,
        np.reshape(losses, shape).transpose(1, 2, 0),
        np.reshape(alphas, shape).transpose(1, 2, 0),
    )
