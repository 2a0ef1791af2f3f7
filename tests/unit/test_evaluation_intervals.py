"""The interval of a score covers the truth, whatever the score, the repeats and the questions are like."""

import math

import numpy as np
import pytest

from megatron_bvpo.evaluation.intervals import interval
from tests.unit.simulated_evaluations import answers, chances


def covered(seed: int, count: int, questions: int, draw) -> tuple[float, float]:
    """Share of simulated evaluations whose interval holds the truth, and the intervals' mean width."""
    random = np.random.default_rng(seed)
    hits, widths = 0, []
    for _ in range(count):
        mean, alike, repeats = draw(random)
        found = interval(answers(random, chances(random, mean, alike, questions), repeats))
        assert 0 <= found.low <= found.score <= found.high <= 1
        hits += found.low <= mean <= found.high
        widths.append(found.high - found.low)
    return hits / count, float(np.mean(widths))


@pytest.mark.parametrize("questions, most", [(30, 64), (500, 8)])
def test_a_thousand_evaluations(questions, most):
    """Any score, questions from alike to all or nothing, any number of repeats."""

    def draw(random) -> tuple[float, float, int]:
        alike = math.exp(random.uniform(math.log(0.3), math.log(4)))
        return random.uniform(0.02, 0.98), alike, int(2 ** random.integers(math.log2(most) + 1))

    share, _ = covered(questions, 1000, questions, draw)
    assert 0.93 <= share <= 0.97


# Where t intervals cover 45 to 90 %: few questions, scores near 0 or 1, few that tell anything.
@pytest.mark.parametrize("mean", [0.03, 0.97])
@pytest.mark.parametrize("repeats", [1, 8, 64])
def test_few_questions_near_the_ends(mean, repeats):
    share, _ = covered(repeats, 4000, 30, lambda random: (mean, 1.0, repeats))
    assert 0.93 <= share <= 0.985


def test_repeats_are_no_questions():
    """64 answers tell what one does where questions are all or nothing; where all are alike, they narrow it."""
    all_or_nothing = [covered(1, 200, 100, lambda _, k=k: (0.5, 0.01, k))[1] for k in (1, 64)]
    alike = [covered(1, 200, 100, lambda _, k=k: (0.5, 200.0, k))[1] for k in (1, 64)]
    assert all_or_nothing[1] == pytest.approx(all_or_nothing[0], rel=0.05)
    assert alike[1] < 0.35 * alike[0]


def test_one_answer_a_question_is_wilsons_interval():
    found = interval([[1.0]] * 27 + [[0.0]] * 3)
    assert found[:3] == pytest.approx((0.9, 0.7438, 0.9654), abs=5e-5)  # R: prop.test(27, 30, correct = FALSE)
    assert found[3:] == (30, 30)


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("repeats", [1, 64])
def test_all_alike_is_no_certainty(score, repeats):
    found = interval([[score] * repeats] * 30)
    assert found.score == score and found.high - found.low == pytest.approx(0.1135, abs=1e-4)


def test_questions_weigh_the_same_and_those_without_answers_are_left_out():
    found = interval([[1.0] * 9, [0.0], []])
    assert (found.score, found.questions, found.answers) == (0.5, 2, 10)


def test_scores_of_another_scale_get_a_t_interval():
    found = interval([[7.0], [8.0], [9.0]])
    assert found[:3] == pytest.approx((8.0, 8 - 4.3027 / math.sqrt(3), 8 + 4.3027 / math.sqrt(3)), abs=1e-3)
    assert interval([[7.0]])[1:3] == (-math.inf, math.inf)


@pytest.mark.parametrize("bad, why", [([], "no question"), ([[]], "no question"), ([[math.nan]], "not finite")])
def test_no_scores(bad, why):
    with pytest.raises(ValueError, match=why):
        interval(bad)
