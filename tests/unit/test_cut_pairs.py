"""Pairs that are longer than the limit: what a cut leaves, and what is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.batches import LAYOUT_KEY
from megatron_bvpo.data.empty_trace import DEFAULT_EMPTY_BLOCK
from megatron_bvpo.data.pair_checks import IGNORED, Account, PairRules, check_pairs, response_start
from megatron_bvpo.streams import PAIR
from tests.unit.encoded_rows import FOUR, LONG, losses, split, template_maker
from tests.unit.sample_rows import row


@pytest.fixture(scope="module")
def make(workshop):
    return template_maker(workshop)


def prompt_tokens(make) -> int:
    return response_start({"labels": make().encode(row())["chosen_labels"]})


def test_a_prompt_longer_than_the_limit_leaves_nothing(make):
    limit = prompt_tokens(make)
    for strategy in ("right", "raise"):
        lost = losses(make(max_length=limit, truncation_strategy=strategy), row())
        assert set(lost) == {"trace", "empty"}
        assert all(f"--max_length {limit}" in loss.reason for loss in lost.values())


@pytest.mark.parametrize("strategy", ["right", "left", "raise"])
def test_a_trace_that_is_lost_leaves_the_empty_pair(strategy, make):
    template = make(max_length=60, truncation_strategy=strategy)
    long = row(f"<think>\n{LONG}\n</think>\n\n4", f"<think>\n{LONG}\n</think>\n\n5")
    encoded, account = template.encode_with_account(long, return_length=True)
    assert (account.pairs, set(account.lost), account.cut) == (("empty",), {"trace"}, ())
    reason = {
        "right": "the same tokens on both sides within --max_length 60",
        "left": "no prompt within --max_length 60",
        "raise": "longer than --max_length 60",
    }
    assert account.lost["trace"].reason == reason[strategy]
    assert not any(key.startswith(("chosen_input", "rejected_input")) for key in encoded)
    assert encoded["lengths"][:2] == [0, 0] and all(encoded["lengths"][2:])
    collated = template.data_collator([encoded, make().encode(row())])
    assert (collated[LAYOUT_KEY].count("trace"), collated[LAYOUT_KEY].count("empty")) == (1, 2)


def test_right_cuts_responses_that_still_differ(make):
    template = make(max_length=60, truncation_strategy="right", streams=("trace",))
    encoded, account = template.encode_with_account(
        row(f"<think>\nTwo. {LONG}</think>4", f"<think>\nA {LONG}</think>5")
    )
    assert account == Account(("trace",), cut=("trace",))
    (prompt, chosen), (other_prompt, rejected) = (split(template, encoded, side) for side in PAIR)
    assert prompt == other_prompt == split(template, make().encode(row()), "chosen")[0]
    assert chosen.startswith("<think>\nTwo.") and rejected.startswith("<think>\nA")
    assert [len(encoded[f"{side}_input_ids"]) for side in PAIR] == [60, 60]


def test_left_cuts_the_prompt_alike_on_both_sides(make):
    entry = row(f"<think>\n{'Hm. ' * 10}\n</think>\n\n4", "<think>\nOh.\n</think>\n\n5")
    entry["messages"] = [{"role": "user", "content": f"First. {LONG}Last."}, entry["messages"][1]]
    whole = make().encode(entry)
    template = make(max_length=100, truncation_strategy="left")
    encoded, account = template.encode_with_account(entry)
    assert account == Account(("trace", "empty"), cut=("trace", "empty"))
    for pair in (FOUR[:2], FOUR[2:]):
        prompts, responses = zip(*(split(template, encoded, name) for name in pair), strict=True)
        assert prompts[0] == prompts[1] and "First." not in prompts[0] and "Last." in prompts[0]
        assert responses == tuple(split(template, whole, name)[1] for name in pair)
        assert max(len(encoded[f"{name}_input_ids"]) for name in pair) == 100
    assert prompts[0].endswith(DEFAULT_EMPTY_BLOCK)


TOKENS = st.lists(st.integers(1, 3), max_size=6)


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 12), st.sampled_from(["right", "left", "raise"]), st.booleans())
@settings(deadline=None, max_examples=300)
def test_what_is_kept_can_be_trained(prompt, chosen, rejected, limit, truncation, other):
    """Whatever is cut: one prompt, a response on both sides, a difference, and no more tokens than allowed."""
    prompts = {"chosen": [0, *prompt], "rejected": [0, *prompt, *([2] if other else [])]}
    pair = {}
    for side, response in zip(PAIR, (chosen, rejected), strict=True):
        ids = [*prompts[side], 7, *response, 8, 9]
        labels = [IGNORED] * (len(prompts[side]) + 1) + [*response, 8, 9]
        pair[side] = {"input_ids": ids, "labels": labels, "length": len(ids), "loss_scale": None}
    rules = PairRules(limit, truncation, (), frozenset([8]), (8, 9), decode=str)
    kept, account = check_pairs({"trace": pair}, rules)
    assert (account.pairs == ("trace",)) == bool(kept) != bool(account.lost)
    assert Account.from_json(account.to_json()) == account
    if not kept:
        return
    assert not other and chosen != rejected
    starts = {side: response_start(sequence) for side, sequence in kept["trace"].items()}
    found = {side: sequence["input_ids"] for side, sequence in kept["trace"].items()}
    assert found["chosen"][: starts["chosen"]] == found["rejected"][: starts["rejected"]] != []
    assert found["chosen"][starts["chosen"] :] != found["rejected"][starts["rejected"] :] != []
    for side, sequence in kept["trace"].items():
        assert len(sequence["labels"]) == sequence["length"] == len(found[side]) <= limit
        assert found[side] == pair[side]["input_ids"][: limit or None] or truncation == "left"
