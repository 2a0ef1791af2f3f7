"""Spikes: steps that stand out from those before them, by a rule that can be said in a sentence. Pure.

The comparison is one of ratios, since losses and gradient norms are positive and skewed: a loss that has come down to
0.01 meets a batch of 0.2 now and then, and that is no accident. On values whose logarithms are normal the rule finds
one in some hundred thousand (tests/unit/test_report_series.py measures it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 50  # logged steps before the one that is judged
FEWEST = 20  # of them, or nothing is judged
DEVIATIONS = 6.0
LEAST_RATIO = 1.5

RULE = (
    f"A logged step is a spike where its value is at least {LEAST_RATIO:g} times the median of the up to {WINDOW} "
    f"logged steps before it, and lies more than {DEVIATIONS:g} robust standard deviations of their logarithms "
    "(1.4826 times the median absolute deviation) above it. "
    f"Nothing is judged before {FEWEST} steps; a value that is not a number always is a spike."
)


def spikes(steps: Sequence[int], values: Sequence[float]) -> list[int]:
    """Steps that are spikes by `RULE`.

    Args:
        steps: optimizer steps, ascending.
        values: losses or gradient norms; those of 0 and below have no logarithm and are neither judged nor counted.
    """
    found, before = [], []
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value):
            found.append(step)
            continue
        if value <= 0:
            continue
        here = math.log(value)
        if len(before) >= FEWEST:
            middle = median(before)
            spread = 1.4826 * median(abs(x - middle) for x in before)
            if here - middle > max(DEVIATIONS * spread, math.log(LEAST_RATIO)):
                found.append(step)
        before = [*before[1 - WINDOW :], here]
    return found
