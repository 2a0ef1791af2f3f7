"""Is the small reasoner better after training on its own pairs? A real engine answers, in both modes.

    launch/test.sh --vllm -s tests/engine/test_verdict.py

The verdict is printed and may be any; tested is that it can be reached, and that it is about fresh questions. Seeds: of
the questions 9, of the requests 0; tests/engine/reasoner_pairs.py has those of the pairs.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_bvpo.evaluation import scores_file
from megatron_bvpo.rehearsal.reasoner import reasoner_folder, write_prompts
from tests.engine.commands import bvpo
from tests.engine.reasoner_pairs import JUDGE
from tests.engine.test_vllm import recipe_says
from tests.engine.vllm_server import serving

pytestmark = pytest.mark.slow
QUESTIONS, REPEATS = 1000, 4
EVAL = (
    f"--repeats {REPEATS} --temperature 1 --top_p 1 --max_tokens 160 --concurrency 64 --tokenizer {reasoner_folder()}"
)


@pytest.fixture(scope="module")
def fresh(sampled) -> Path:
    """Held-out questions that no pair was made of."""
    rows = write_prompts(sampled / "drawn.jsonl", QUESTIONS + 200, seed=9, split="heldout").read_text().splitlines()
    seen = {_question(line) for line in (sampled / "samples.jsonl").read_text().splitlines()}
    left = [line for line in rows if _question(line) not in seen][:QUESTIONS]
    assert len(left) == QUESTIONS
    (sampled / "fresh.jsonl").write_text("".join(f"{line}\n" for line in left))
    suite = {"datasets": [{"file": "fresh.jsonl", "name": "problems", "judge": JUDGE, "threshold": 1}]}
    (sampled / "fresh.yaml").write_text(json.dumps(suite))
    return sampled / "fresh.yaml"


def _question(line: str) -> str:
    return json.loads(line)["messages"][0]["content"]


@pytest.fixture(scope="module")
def evaluated(sampled, trained, fresh) -> Path:
    """Folders `before` and `after` with scores.json; one server has the model and its adapter."""
    said = bvpo("export", f"{trained.folder}/last-checkpoint", "--out", "after-adapter", cwd=sampled)
    flags = shlex.split(re.search(r"^serve it: vllm serve \S+ (.*)$", said, re.M)[1])
    flags[-1] = flags[-1].replace("after-adapter=", "after=")
    with serving(reasoner_folder(), "before", sampled / "verdict.log", *flags) as address:
        for name in ("before", "after"):
            asked = f"eval --server {address} --model {name} --suite {fresh} --out {name} {EVAL}"
            bvpo(*asked.split(), cwd=sampled)
    return sampled


@pytest.mark.parametrize("mode", ["thinking", "empty"])
def test_everything_was_answered_and_the_model_is_the_recipe_s(evaluated, mode):
    before, after = (scores_file.read(evaluated / name).of("problems", mode) for name in ("before", "after"))
    for score in (before, after):
        assert (score.questions, score.answers, score.failed) == (QUESTIONS, QUESTIONS * REPEATS, 0)
    assert before.by_question != after.by_question
    expected = recipe_says(mode)
    assert abs(before.score - expected) < 3 * (expected * (1 - expected) * 2 / 1000) ** 0.5


def test_the_verdict_is_a_sentence_for_each_mode(evaluated):
    lines = bvpo("compare", "before", "after", cwd=evaluated).splitlines()
    verdicts = [line for line in lines if " on problems with" in line]
    assert len(lines) == len(verdicts) == 2, lines
    for line, mode in zip(verdicts, ("with thinking", "without thinking"), strict=True):
        assert re.match(r"(after|before) (beats|is ahead of) (after|before) by \d", line) and mode in line
