"""Training with three streams: marginal loss over the run for each way of choosing the weights, on common pairs.

Shapes: G arms, Z seeds, S = G * Z runs, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from megatron_bvpo.gradients.weights import WeightEstimator
from truth_bench.model import Array, Task
from truth_bench.regimes import Regime
from truth_bench.streams import STREAMS, gram_triangles, grams, half_gradients, part_of, sample_short
from truth_bench.training import Adam, is_probe


class NotMovedUp(WeightEstimator):
    """MATH.md §5 as it stands: where noise makes B negative it counts as 0."""

    def expected_weights(self, values: Array, spread: Array) -> Array:
        return self.clipped_weights(values)


class TwoByAlpha:
    """Trace and empty, weighted as the program does by default."""

    def __init__(self, **settings) -> None:
        self.estimator = AlphaEstimator(**settings)

    def update(self, triangles: Array) -> None:
        tt, te, _, ee, *_ = (float(v) for v in triangles)
        self.estimator.update(Moments(D=float(triangles[6]), X=tt - te, W=tt + ee - 2 * te))

    def weights(self) -> Array:
        return np.array([self.estimator.alpha, 1 - self.estimator.alpha, 0.0])


class ByGrams:
    """Any of the streams, weighted by their Gram matrices."""

    def __init__(self, streams: tuple[str, ...] = STREAMS, kind: type[WeightEstimator] = WeightEstimator, **settings):
        self.estimator = kind(streams, **settings)

    def update(self, triangles: Array) -> None:
        self.estimator.update(part_of(grams(triangles), self.estimator.streams))

    def weights(self) -> Array:
        return np.array([self.estimator.weights.get(s, 0.0) for s in STREAMS])


@dataclass(frozen=True)
class StreamArm:
    """One way of choosing the weights: `fixed` ones, or an estimator."""

    name: str
    fixed: tuple[float, float, float] | None = None
    make: Callable[[], TwoByAlpha | ByGrams] | None = None


def stream_arms() -> list[StreamArm]:
    sgd = {"criterion": "sgd", "kappa": 0.03}
    return [
        StreamArm("trace", (1.0, 0.0, 0.0)),
        StreamArm("half empty", (0.5, 0.5, 0.0)),
        StreamArm("half, quarter, quarter", (0.5, 0.25, 0.25)),
        StreamArm("two auto", make=lambda: TwoByAlpha(**sgd)),
        StreamArm("two by Grams", make=lambda: ByGrams(("trace", "empty"), **sgd)),
        StreamArm("three auto", make=lambda: ByGrams(**sgd)),
        StreamArm("three auto, decay .97", make=lambda: ByGrams(**sgd, moment_decay=0.97)),
        StreamArm("three, not moved up", make=lambda: ByGrams(kind=NotMovedUp, **sgd)),
    ]


@dataclass(frozen=True)
class StreamTraining:
    """Marginal loss [G, Z] at the start and over the last tenth of the run, and the last weights [G, Z, k]."""

    arms: list[StreamArm]
    start: float
    final: Array
    weights: Array


def train_streams(regime: Regime, optimizer: str, lr: float, steps: int, seeds: int, *, seed: int) -> StreamTraining:
    """All arms and seeds side by side; the arms of one seed see the same pairs. Adam's rate decays to 0 (cosine)."""
    task = Task(regime.task)
    short, arms, rng = task.shortened(), stream_arms(), np.random.default_rng(seed)
    G = len(arms)
    theta_SP = np.tile(task.theta_ref_P, (G * seeds, 1))
    estimators = [arm.make() if arm.make else None for arm in arms for _ in range(seeds)]
    prior = (0.5, 0.25, 0.25)
    weights_Sk = np.repeat([arm.fixed or prior for arm in arms], seeds, axis=0)
    for run, estimator in enumerate(estimators):
        if estimator is not None:
            weights_Sk[run] = estimator.weights()
    adam = Adam(optimizer, lr, theta_SP.shape)
    share = np.array([regime.n_first, regime.pairs - regime.n_first]) / regime.pairs
    start, losses = float(task.marginal_loss(theta_SP[:1])[0]), []
    for step in range(steps):
        batch = task.sample(rng, seeds, regime.pairs)
        brief = sample_short(task, short, rng, batch)
        g_SkhP = half_gradients(task, short, theta_SP, batch.tile(G), brief.tile(G), regime.n_first)
        if optimizer == "adam":
            adam.lr = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        theta_SP = theta_SP + adam.step(np.einsum("sk,h,skhp->sp", weights_Sk, share, g_SkhP, optimize=True))
        if is_probe(step):
            for run, triangles in enumerate(gram_triangles(g_SkhP, regime.n_first, regime.pairs)):
                if estimators[run] is not None:
                    estimators[run].update(triangles)
                    weights_Sk[run] = estimators[run].weights()
        if step >= 0.9 * steps and step % 10 == 9:
            losses.append(task.marginal_loss(theta_SP))
    shape = (G, seeds)
    return StreamTraining(arms, start, np.mean(losses, 0).reshape(shape), weights_Sk.reshape(*shape, -1))
