"""Is the small reasoner better after training on its own pairs? A real engine answers, in both modes.

    launch/test.sh --vllm -s tests/engine/test_verdict.py

The verdict is printed and may be any; tested is that it can be reached. reasoner_pairs.py has what is done, and the
seeds.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bvpo.evaluation import scores_file
from tests.engine.commands import bvpo
from tests.engine.reasoner_pairs import QUESTIONS, REPEATS, evaluate
from tests.engine.test_vllm import recipe_says

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated(paired, trained) -> Path:
    """A folder with the evaluations `before` and `after`."""
    evaluate(paired, trained.folder / "last-checkpoint")
    return paired


@pytest.mark.parametrize("mode", ["thinking", "empty"])
def test_everything_was_answered_and_the_model_is_the_recipe_s(evaluated, mode):
    before, after = (scores_file.read(evaluated / name).of("problems", mode) for name in ("before", "after"))
    for score in (before, after):
        assert (score.questions, score.answers, score.failed) == (QUESTIONS, QUESTIONS * REPEATS, 0)
    assert before.by_question != after.by_question
    expected = recipe_says(mode)
    assert abs(before.score - expected) < 3 * (expected * (1 - expected) * (1 / QUESTIONS + 1 / 1000)) ** 0.5


def test_the_verdict_is_a_sentence_for_each_mode(evaluated):
    lines = bvpo("compare", "before", "after", cwd=evaluated).splitlines()
    assert len(lines) == 2, "and nothing stands between the two"
    for line, mode in zip(lines, ("with thinking", "without thinking"), strict=True):
        told = r"(after|before) (beats|is ahead of) (after|before) by [0-9.± ]+|before and after score the same"
        assert re.match(rf"({told}) on problems {mode}", line)
