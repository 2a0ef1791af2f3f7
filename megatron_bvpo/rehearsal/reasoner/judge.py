"""Judging by reasoning-gym's own scorers: `megatron_bvpo.rehearsal.reasoner.judge:score`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping


def score(text: str, answer: str, columns: Mapping) -> float:
    """1.0 when reasoning-gym's scorer of the family takes `text` for the right answer, less otherwise.

    Args:
        text: the final answer, without a trace.
        answer: the right one.
        columns: `family` and `metadata`, as `write_prompts` writes them.

    Raises:
        KeyError: a column is missing.
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    entry = dict(answer=answer, metadata=columns["metadata"])
    return float(_scorer(columns["family"])(text.strip(), entry))


@functools.cache
def _scorer(family: str) -> Callable[[str, dict], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(family)
