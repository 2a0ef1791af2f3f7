"""A real engine: 200 prompts are sampled in three modes and judged; pairs of 2,000 in two modes train their model."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from tests.engine.reasoner_pairs import MODES, PROMPTS, SAMPLES

pytestmark = pytest.mark.slow


def test_every_answer_is_there_once(sampled):
    from megatron_bvpo.sampling.samples import THINKS, read_samples

    found = Counter((s.prompt_id, s.mode) for s in read_samples(sampled / "samples"))
    assert len(found) == PROMPTS * len(MODES) and set(found.values()) == {SAMPLES}
    for sample in read_samples(sampled / "samples"):
        assert sample.finish_reason in ("stop", "length") and sample.logprob_sum is not None
        traced = sample.mode != "empty" or THINKS in sample.marks
        assert sample.text.startswith("<think>") == traced, sample


def recipe_says(mode: str) -> float:
    """The accuracy in the reasoner's README: `| all (1,000 draws) | .643 [.613, .672] | .226 [.201, .253] |`."""
    from megatron_bvpo.rehearsal.reasoner import reasoner_folder

    (line,) = re.findall(r"^\| all .*$", (reasoner_folder().parent / "README.md").read_text(), re.M)
    return float(line.split("|")[{"thinking": 2, "empty": 3}[mode]].split()[0])


@pytest.mark.parametrize("mode", ["thinking", "empty"])
def test_accept_rates_are_the_recipe_s(sampled, mode):
    from megatron_bvpo.sampling.samples import read_judgements

    right = [j.right for j in read_judgements(sampled / "samples", "gym") if j.mode == mode and j.right is not None]
    rate, expected = sum(right) / len(right), recipe_says(mode)
    # Answers of one prompt go together: with all of a prompt alike, 200 prompts count and not 1,600 answers; the
    # recipe's own number comes from 1,000 draws.
    bound = 3 * (expected * (1 - expected) * (1 / PROMPTS + 1 / 1000)) ** 0.5
    print(f"{mode}: {rate:.3f}, the recipe says {expected:.3f}, bound {bound:.3f}")
    assert abs(rate - expected) < bound


@pytest.mark.parametrize("stream", ["", "empty/"])
def test_accuracy_on_held_out_pairs_rises(paired, trained, stream):
    rows = [json.loads(line) for line in (paired / "pairs_heldout.jsonl").read_text().splitlines()]
    field = "empty_response" if stream else "rejected_response"
    pairs = sum(field in row for row in rows)
    assert pairs >= 40, "too few to tell"
    evaluations = [line for line in trained.log if "eval_loss" in line]
    before, after = (line[f"eval_{stream}rewards/accuracies"] for line in (evaluations[0], evaluations[-1]))
    print(f"{stream or 'trace/'}: {pairs} held-out pairs, {before:.3f} → {after:.3f}")
    assert before == 0.5, "the policy is the reference: ties"
    assert after > 0.5 + 2 * (0.25 / pairs) ** 0.5
