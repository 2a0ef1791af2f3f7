"""Evaluations whose truth is known: questions drawn from a population, answers right with each question's chance."""

import numpy as np


def chances(random: np.random.Generator, mean: float, alike: float, questions: int) -> np.ndarray:
    """Each question's chance of a right answer, [questions]; the smaller `alike`, the more are all or nothing."""
    return random.beta(mean * alike, (1 - mean) * alike, questions)


def answers(random: np.random.Generator, chance: np.ndarray, repeats: int) -> list[list[float]]:
    """Scores of each question's answers, 0 or 1."""
    return (random.random((len(chance), repeats)) < chance[:, None]).astype(float).tolist()


def named(scores: list[list[float]]) -> dict[str, list[float]]:
    return {f"q{i}": row for i, row in enumerate(scores)}


def two_runs(
    random, questions: int, repeats: int, gain: float, mean: float = 0.5, alike: float = 1.0, kept: float = 0.7
):
    """Two models' evaluations of the same questions; B's true mean is `gain` higher.

    A share `kept` of the questions is as hard for B as for A, the others have nothing in common but the population.
    """
    first = chances(random, mean, alike, questions)
    second = np.where(random.random(questions) < kept, first, chances(random, mean, alike, questions))
    second = second + gain * (1 - second) / (1 - mean)
    return named(answers(random, first, repeats)), named(answers(random, second, repeats))
