"""Intervals over questions and seeds at once. Pure.

Every seed's run answers the same questions, so that a number d[s, q] has three sources of chance: the seeds that were
drawn, the questions that were drawn, and what is left (the answer itself). With the variances of the means over each,

    var(mean) = v_q + v_s − v_e
    v_q = Var_q(mean over s)/n_q,  v_s = Var_s(mean over q)/n_s,  v_e = Var(rest)/(n_s n_q)

as v_q and v_s both hold v_e. (A random-effects analysis of variance, two-way crossed, one number a cell.) The degrees
of freedom are Satterthwaite's, so that six seeds are taken for six where seeds rule.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Estimate(NamedTuple):
    """A mean.

    Attributes:
        half: of its 95 % interval, Student's.
        p: of its being 0, two-sided.
        seeds, questions: of which it is the mean.
        freedom: Student's degrees.
    """

    mean: float
    half: float
    p: float
    seeds: int
    questions: int
    freedom: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"

    @property
    def error(self) -> float:
        """The standard error."""
        return self.half / float(student.ppf(0.975, self.freedom))

    def among(self, comparisons: int) -> float:
        """Half of the interval that holds for so many comparisons at once (Bonferroni's)."""
        return float(student.ppf(1 - 0.025 / comparisons, self.freedom)) * self.error


def crossed(values: np.ndarray) -> Estimate:
    """The mean over seeds and questions.

    Args:
        values: [seeds, questions], two of each at least.
    """
    seeds, questions = values.shape
    mean = values.mean()
    of_questions, of_seeds = values.mean(0), values.mean(1)
    v_q = of_questions.var(ddof=1) / questions
    v_s = of_seeds.var(ddof=1) / seeds
    rest = values - of_questions[None] - of_seeds[:, None] + mean
    v_e = (rest**2).sum() / ((seeds - 1) * (questions - 1)) / (seeds * questions)
    # Chance can make either smaller than what it holds.
    variance = max(v_q + v_s - v_e, v_q, v_s)
    if variance == 0:
        return Estimate(float(mean), 0.0, 1.0, seeds, questions, seeds - 1)
    freedom = variance**2 / (v_s**2 / (seeds - 1) + v_q**2 / (questions - 1))
    return _estimate(float(mean), math.sqrt(variance), max(1.0, freedom), seeds, questions)


def over_seeds(values: np.ndarray) -> Estimate:
    """The mean of one number a seed: Student's."""
    n = len(values)
    return _estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n), n - 1, n, 0)


def _estimate(mean: float, error: float, freedom: float, seeds: int, questions: int) -> Estimate:
    if error == 0:
        return Estimate(mean, 0.0, 1.0 if mean == 0 else 0.0, seeds, questions, freedom)
    p = 2 * float(student.sf(abs(mean) / error, freedom))
    return Estimate(mean, float(student.ppf(0.975, freedom)) * error, p, seeds, questions, freedom)


def detectable(estimate: Estimate, comparisons: int = 1) -> float:
    """The difference that would be told with a chance of 80 %, the level divided by the number of comparisons.

    By the noncentral t distribution: few seeds know their own spread badly, which normal quantiles would not count.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    limit = float(student.ppf(1 - 0.025 / comparisons, estimate.freedom))
    return estimate.error * float(brentq(lambda shift: nct.sf(limit, estimate.freedom, shift) - 0.8, 0, 3 * limit + 10))
