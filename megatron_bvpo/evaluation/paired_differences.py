"""Two evaluations of the same questions: their difference, whether it is one, and what it would take to tell. Pure.

A question's difference d is the difference of its means over repeats. What the questions have in common, that some are
hard for both, falls out of d, so that a paired difference is known far better than two scores.

- The interval of the mean of d is Student's, over questions.
- The p-value is that of flipped signs: if both runs are alike, each question's difference could as well have had the
  other sign. It holds for any number of questions, where t's fails for a handful that differ.
- The variance of d over questions is that of the true differences and what chance adds within each question, which
  falls with the number of repeats. More questions lower both, more repeats the second alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from megatron_bvpo.evaluation.intervals import normal_quantile, t_quantile

POWER = 0.8
LEVEL = 0.05
# Steps of the finest grid that differences are looked for on: 64 repeats against 64, or 7 against 9.
_FINEST = 1024


class Difference(NamedTuple):
    """B − A on the questions that both have answers to.

    Attributes:
        difference: mean over questions.
        half_width: of its 95 % interval.
        p_value: of flipped signs, two-sided, of this comparison alone.
        questions: how many both have.
        left_out: how many only one has.
        repeats: answers a question, (A, B); the mean where they differ.
        variance: of d over questions.
        noise: the part of it that repeats lower, at the repeats there are; None where no question has two answers.
    """

    difference: float
    half_width: float
    p_value: float
    questions: int
    left_out: int
    repeats: tuple[float, float]
    variance: float
    noise: float | None


class Needed(NamedTuple):
    """What it would take to tell a difference with a chance of 80 %.

    Attributes:
        size: the difference.
        questions: so many, at the repeats there are.
        repeats: so many for each question, at the questions there are; None: no number would do, or it is not known.
        knows_repeats: whether repeats were enough to say.
    """

    size: float
    questions: int
    repeats: int | None
    knows_repeats: bool


def difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Difference | None:
    """B − A over common questions; None where there are fewer than two.

    Args:
        a, b: question → scores of its answers.
    """
    left = {question for question, scores in a.items() if len(scores)}
    right = {question for question, scores in b.items() if len(scores)}
    common = sorted(left & right)
    n = len(common)
    if n < 2:
        return None
    pairs = [(a[question], b[question]) for question in common]
    differences = [_mean(theirs) - _mean(ours) for ours, theirs in pairs]
    found = _mean(differences)
    spread = math.fsum((d - found) ** 2 for d in differences)
    repeats = (_mean([len(ours) for ours, _ in pairs]), _mean([len(theirs) for _, theirs in pairs]))
    # Where nothing differs chance still would: as if one answer to one question did, each way.
    spread = max(spread, 2 / max(repeats) ** 2)
    variance = spread / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    noise = _noise(pairs)
    return Difference(
        difference=found,
        half_width=half,
        p_value=flipped_signs(differences),
        questions=n,
        left_out=len(left ^ right),
        repeats=repeats,
        variance=variance,
        noise=None if noise is None else min(noise, variance),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _noise(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """The mean over questions of the variance that chance gives d; each side's own variance over its repeats."""
    total = 0.0
    for side in (0, 1):
        variances = [_variance(pair[side]) for pair in pairs if len(pair[side]) > 1]
        if not variances:
            return None
        total += _mean(variances) * _mean([1 / len(pair[side]) for pair in pairs])
    return total


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def flipped_signs(differences: Sequence[float]) -> float:
    """The share of all sign flips whose sum is at least as far from 0, exactly.

    The differences lie on a grid (of 1 / repeats); where they do not (grades), they are put on one of a thousand steps.
    Flipped signs have the characteristic function Π cos(d t), and its Fourier transform is the sums' distribution.
    """
    import numpy as np

    steps = _on_a_grid(differences)
    found, reach = abs(sum(steps)), sum(map(abs, steps))
    if found == 0:
        return 1.0
    length = 1 << (2 * reach).bit_length()  # longer than the sums' range, so that none wraps around
    angles = np.arange(length // 2 + 1) * (2 * np.pi / length)
    function = np.ones(len(angles))
    for size, count in Counter(map(abs, steps)).items():
        function *= np.cos(size * angles) ** count
    chances = np.fft.irfft(function, length)
    return float(min(1.0, max(0.0, 2 * chances[found : reach + 1].sum())))


def _on_a_grid(differences: Sequence[float]) -> list[int]:
    values = {abs(d) for d in differences}
    steps = math.lcm(*(Fraction(value).limit_denominator(_FINEST).denominator for value in values))
    if steps > _FINEST or any(abs(value * steps - round(value * steps)) > 1e-6 for value in values):
        steps = 1000 / max(values)
    return [round(d * steps) for d in differences]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values: below `LEVEL`, and the chance that any of them is a false alarm is below it, too."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


def detectable(of: Difference, comparisons: int = 1) -> float:
    """The difference that an evaluation like this one tells with a chance of 80 %.

    Args:
        of: the comparison.
        comparisons: how many are made together; the level is divided by it.
    """
    return _sigmas(comparisons) * math.sqrt(of.variance / of.questions)


def needed(of: Difference, size: float, comparisons: int = 1) -> Needed:
    """The questions, or the repeats, that a difference of `size` (> 0) would take."""
    square = (size / _sigmas(comparisons)) ** 2
    questions = max(2, math.ceil(of.variance / square))
    if of.noise is None:
        return Needed(size, questions, None, False)
    room = square * of.questions - (of.variance - of.noise)
    if room <= 0:
        return Needed(size, questions, None, True)
    # The noise of each side falls as 1 / repeats; both sides get the same number.
    per_answer = of.noise / (sum(1 / k for k in of.repeats) / 2)
    return Needed(size, questions, max(1, math.ceil(per_answer / room)), True)


def _sigmas(comparisons: int) -> float:
    """How many standard errors a difference must be long."""
    return normal_quantile(1 - LEVEL / 2 / max(1, comparisons)) + normal_quantile(POWER)
