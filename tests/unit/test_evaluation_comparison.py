"""Comparisons find what is there, call what is not there by its stated rate, and say truly what it would take."""

from itertools import product

import numpy as np
import pytest

from megatron_bvpo.evaluation import comparison
from megatron_bvpo.evaluation.paired_differences import detectable, difference, flipped_signs, holm, needed
from megatron_bvpo.evaluation.scores_file import Score, Scores
from tests.unit.simulated_evaluations import named, two_runs


def told(seed: int, count: int, questions: int, repeats: int, gain: float, **more) -> tuple[float, float]:
    """Shares of simulated comparisons that find a difference, and whose interval holds the true one."""
    random = np.random.default_rng(seed)
    found = [difference(*two_runs(random, questions, repeats, gain, **more)) for _ in range(count)]
    tells = sum(d.p_value < 0.05 for d in found)
    return tells / count, sum(abs(d.difference - gain) <= d.half_width for d in found) / count


def test_three_points_on_two_thousand_questions():
    finds, covers = told(1, 200, 2000, 4, 0.03)
    assert finds >= 0.8 and covers >= 0.91


# One in twenty is called, no more; at 30 questions near 1, hardly one differs, and fewer are.
@pytest.mark.parametrize(
    "questions, repeats, mean, low, high",
    [(500, 4, 0.5, 0.032, 0.07), (30, 8, 0.5, 0.03, 0.07), (30, 1, 0.95, 0, 0.07)],
)
def test_a_null_difference_is_called_at_its_rate(questions, repeats, mean, low, high):
    rate, covers = told(2, 1000, questions, repeats, 0.0, mean=mean)
    assert low <= rate <= high
    assert covers >= 0.93


def test_six_datasets_together_are_called_at_the_rate_of_one():
    random = np.random.default_rng(3)
    called = 0
    for _ in range(300):
        p = [difference(*two_runs(random, 60, 4, 0.0)).p_value for _ in range(6)]
        called += min(holm(p)) < 0.05
    assert called / 300 <= 0.085  # .05 and three standard errors; without correction .26


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_flipped_signs_are_counted_right():
    # Five questions, all better by the same: 2 of 32 flips are as far.
    assert flipped_signs([0.25] * 5 + [0.0] * 20) == pytest.approx(2 / 32)
    # 0.5 + 0.25 - 0.25: |sum| ≥ .5 in 6 of 8.
    assert flipped_signs([0.5, 0.25, -0.25]) == pytest.approx(6 / 8)
    assert flipped_signs([0.0] * 9) == 1.0
    # The sign test: 41 of 60.
    assert flipped_signs([1 / 3] * 41 + [-1 / 3] * 19) == pytest.approx(0.0062176, abs=1e-6)
    # Grades on no grid, against all flips.
    grades = [0.31, 0.1234, -0.07, 0.456789, 0.222, -0.0101, 0.3, 0.5, 0.09]
    sums = [abs(sum(s * g for s, g in zip(signs, grades, strict=True))) for signs in product((1, -1), repeat=9)]
    assert flipped_signs(grades) == pytest.approx(sum(s >= sum(grades) - 1e-9 for s in sums) / 512, abs=0.005)


def test_what_it_would_take_is_enough():
    """As many questions, or as many repeats, as it says find the difference four times in five."""
    random = np.random.default_rng(4)
    # The true variances, from a large evaluation.
    large = difference(*two_runs(random, 20_000, 4, 0.03))
    need = needed(large._replace(questions=1200), 0.03)
    assert need.repeats and need.questions != 20_000
    assert told(5, 200, need.questions, 4, 0.03)[0] == pytest.approx(0.8, abs=0.09)
    assert told(6, 200, 1200, need.repeats, 0.03)[0] == pytest.approx(0.8, abs=0.09)


def test_no_number_of_repeats_makes_up_for_questions():
    random = np.random.default_rng(7)
    few = difference(*two_runs(random, 30, 8, 0.0, alike=0.3))
    need = needed(few, 0.01)
    assert need.repeats is None and need.knows_repeats and need.questions > 1000
    single = difference(*two_runs(random, 30, 1, 0.0))
    assert needed(single, 0.01)[2:] == (None, False)
    assert detectable(few, 6) > detectable(few) > 0.03


def test_the_variance_is_split_into_questions_and_chance():
    random = np.random.default_rng(8)
    found = difference(*two_runs(random, 20_000, 4, 0.0, alike=1.0, kept=1.0))
    # Equal chances: all of the variance is chance, 2 · E[q (1 − q)] / 4 with q ~ Beta(½, ½): 1/8.
    assert found.variance == pytest.approx(2 * 0.125 / 4, rel=0.03)
    assert found.noise == pytest.approx(found.variance, rel=0.03)


def evaluation(by_dataset: dict[str, dict], settings=None) -> Scores:
    scores = [
        Score.of(by_question, dataset=name, title=name.upper(), mode="thinking", metric="acc", repeats=1, tokens=None,
                 cut_off=0.0, unparsed=0.0, thinks=None, failed=0)
        for name, by_question in by_dataset.items()
    ]  # fmt: skip
    return Scores("m", "math", settings or {}, scores, [])


def sentences(a: dict, b: dict, **more) -> list[str]:
    return [c.sentence() for c in comparison.compare([("A", evaluation(a)), ("B", evaluation(b))], **more)]


def test_sentences():
    better = named([[1.0]] * 60 + [[0.0]] * 140)
    worse = named([[1.0]] * 30 + [[0.0]] * 170)
    (line,) = sentences({"math": worse}, {"math": better})
    assert line == "B beats A by 15.0 ± 5.0 on MATH with thinking (200 questions, p < .001)."
    (line,) = sentences({"math": better}, {"math": worse})
    assert line.startswith("A beats B by 15.0 ± 5.0 on MATH")
    (line,) = sentences({"aime": named([[1.0, 0.0]] * 30)}, {"aime": named([[1.0, 1.0]] + [[1.0, 0.0]] * 29)})
    assert line.startswith("B is ahead of A by 1.7 ± 4.9 on AIME with thinking, but 30 questions cannot tell (p 1)")
    assert "1.7 would take" in line and "questions, " in line
    (line,) = sentences({"few": named([[1.0]] * 5)}, {"few": named([[0.0]] * 5)})
    assert line == "A and B cannot be told apart on FEW with thinking: 5 questions are too few to tell anything."
    (line,) = sentences({"few": named([[0.0]] * 6)}, {"few": named([[1.0]] * 6)})
    assert line.startswith("B beats A by 100.0")
    (line,) = sentences({"aime": better}, {"aime": better})
    assert line.startswith("A and B score the same on AIME with thinking")


def test_what_one_comparison_tells_six_may_not():
    """7 of 7 differing questions: p .016 alone, and not among six comparisons."""
    some, more = named([[0.0]] * 40), named([[1.0]] * 7 + [[0.0]] * 33)
    assert sentences({"a": some}, {"a": more})[0].startswith("B beats A")
    line = sentences(
        {"a": some, **{f"d{i}": some for i in range(5)}}, {"a": more, **{f"d{i}": some for i in range(5)}}
    )[0]
    assert line.startswith("B is ahead of A by 17.5 ±") and "corrected for 6 comparisons" in line


def test_questions_of_one_alone_are_left_out_and_said():
    a, b = named([[1.0]] * 10), {"other": [0.0], **named([[1.0]] * 9)}
    first, second = evaluation({"math": a}), evaluation({"math": b})
    (found,) = comparison.compare([("A", first), ("B", second)])
    assert (found.found.questions, found.found.left_out, found.found.difference) == (9, 2, 0.0)
    (line,) = comparison.remarks([("A", first), ("B", second)])
    assert line == "A and B on MATH with thinking: 2 questions are in one of them only and left out"


def test_three_evaluations_and_a_baseline():
    runs = [(name, evaluation({"math": named([[float(i % 2)] for i in range(9)])})) for name in "ABC"]
    assert [(c.a, c.b) for c in comparison.compare(runs)] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert [(c.a, c.b) for c in comparison.compare(runs, baseline="B")] == [("B", "A"), ("B", "C")]
