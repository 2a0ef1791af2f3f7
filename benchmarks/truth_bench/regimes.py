"""The regimes of the bench: a task, a batch size, and where the policy stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from truth_bench.model import Array, Task, TaskConfig


@dataclass(frozen=True)
class Regime:
    """Attributes:
    what: the one thing that sets the regime apart.
    pairs: pairs in the batch; `first_half` of them are half A.
    moved: the policy is the sampler plus this much per parameter (random), or, below 0, the sampler after
        -moved steps of exact gradient descent on the expected trace loss.
    shrink: the gradients fall by this factor over 40 probes.
    """

    name: str
    what: str
    task: TaskConfig
    pairs: int = 16
    first_half: int | None = None
    moved: float = 0.02
    shrink: float = 1.0

    @property
    def n_first(self) -> int:
        return self.first_half or self.pairs // 2


BASE = TaskConfig()
# The policy of the first twelve stands a little off its sampler: exactly on it, b_t is 0 to rounding.
REGIMES = (
    Regime("base", "3 letters, 16 pairs", BASE),
    Regime("short", "traces of 1 letter", TaskConfig(length=1)),
    Regime("long", "traces of 4 letters", TaskConfig(length=4)),
    Regime("noisy", "4 letters, drawn almost uniformly", TaskConfig(length=4, trace_scale=0.2)),
    Regime("biased", "empty stream far off", TaskConfig(empty_offset=1.0)),
    Regime("unbiased", "empty stream nearly right", TaskConfig(empty_offset=0.0)),
    Regime("tiny-batch", "4 pairs, halves of 1 and 3", BASE, pairs=4, first_half=1),
    Regime("large-batch", "64 pairs", BASE, pairs=64),
    Regime("shared", "same answers in both streams", TaskConfig(empty_answers="strip", length=1)),
    Regime(
        "correlated",
        "same answers, the trace matters little",
        TaskConfig(empty_answers="strip", length=2, empty_offset=0.0, trace_effect=0.3),
        pairs=32,
        moved=0.005,
    ),
    Regime("decisive", "the trace decides the answer", TaskConfig(trace_effect=3.0, empty_offset=1.0), pairs=32),
    Regime("shrinking", "gradients fall 30x in 40 probes", BASE, pairs=64, shrink=30.0),
    Regime("moved", "policy far from its sampler, at random", BASE, pairs=64, moved=0.4),
    Regime("trained", "policy far from its sampler, by training", BASE, pairs=64, moved=-300),
)


def policy(regime: Regime, task: Task) -> Array:
    """Where the policy stands [P]."""
    from truth_bench.exact import truth

    theta = task.theta_ref_P.copy()
    if regime.moved >= 0:
        return theta + regime.moved * np.random.default_rng(1).normal(size=theta.size)
    for _ in range(int(-regime.moved)):
        theta -= 3.0 * truth(task, theta).mean_t
    return theta
