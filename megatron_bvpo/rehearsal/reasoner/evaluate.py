"""How often the reasoner is right on held-out problems, with and without thinking, by family."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from megatron_bvpo.rehearsal.reasoner.problems import FAMILIES, Problem, problems
from megatron_bvpo.rehearsal.reasoner.sampling import Reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import MODES


class Accuracy(NamedTuple):
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        z, p, n = 1.96, self.share, self.asked
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.3f} [{low:.3f}, {high:.3f}]"


def is_right(problem: Problem, final: str) -> bool:
    """Whether reasoning-gym's scorer of the family takes `final`, an answer without a trace, for the right one.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed (extra `rehearsal`).
    """
    return _scorer(problem.family)(final, dict(answer=problem.answer, metadata=problem.metadata)) == 1.0


@functools.cache
def _scorer(family: str) -> Callable[[str, dict], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(family)


def accuracies(
    reasoner: Reasoner, asked: list[Problem], mode: str, *, seed: int = 0, temperature: float = 1.0
) -> dict[str, Accuracy]:
    """One answer to each problem, judged; by family, and `all`. Only families that occur are in it."""
    answers = sample(reasoner, [p.question for p in asked], mode, temperature=temperature, seed=seed)
    verdicts = [
        (problem.family, is_right(problem, answer.final)) for problem, (answer,) in zip(asked, answers, strict=True)
    ]
    table = {}
    for family in ("all", *FAMILIES):
        mine = [right for of, right in verdicts if family in ("all", of)]
        if mine:
            table[family] = Accuracy(sum(mine), len(mine))
    return table


def evaluate(reasoner: Reasoner, n: int, *, seed: int = 0) -> dict[tuple[str, str], Accuracy]:
    """`n` draws of held-out problems in both modes at temperature 1: (mode, family or `all`) → accuracy."""
    drawn = list(islice(problems(seed, "heldout"), n))
    return {(mode, f): value for mode in MODES for f, value in accuracies(reasoner, drawn, mode, seed=seed).items()}
