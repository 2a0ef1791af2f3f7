"""What was judged is what is trained: rows through ms-swift's own templates, with a tokenizer of a tiny model."""

from __future__ import annotations

import json

import pytest

from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.pair_checks import IGNORED, Account
from megatron_bvpo.streams import PAIR
from tests.unit.encoded_rows import FOUR, LONG, OTHER, TOOL, losses, split, template_maker
from tests.unit.sample_folders import synthetic
from tests.unit.sample_rows import CHOSEN, OWN, REJECTED, row, talk


@pytest.fixture(scope="module")
def make(workshop):
    return template_maker(workshop)


# --- one prompt ---

ROWS = {
    "plain": row(),
    "own answers": row(**OWN),
    "a conversation": {"messages": talk(), "rejected_messages": talk(REJECTED)},
    "history": {**row(), "messages": [*talk("<think>a</think>Hello."), *talk()]},
    "history that counts": {**row(), "messages": [talk()[0], {**talk("Hello.")[1], "loss": True}, *talk()]},
    "tools of the chosen": {"messages": talk(), "rejected_messages": talk(REJECTED), "tools": [TOOL]},
    "tools of the rejected": row(rejected_tools=[TOOL]),
    "settings of the chosen": {
        "messages": [*talk("<think>a</think>Hello."), *talk()],
        "rejected_messages": [*talk("<think>a</think>Hello."), *talk(REJECTED)],
        "chat_template_kwargs": {"preserve_thinking": True},
    },
    "white space in front": row(chosen=f"\n{CHOSEN}"),
    "one empty trace": row(chosen="<think>\n\n</think>\n\nIt is 4."),
    "no trace's opening": row(chosen=CHOSEN[8:]),
}


@pytest.mark.parametrize("name", ["qwen3_thinking", "qwen3", "deepseek_v3_1"])
@pytest.mark.parametrize("case", ROWS)
def test_all_four_answer_one_prompt_and_nothing_else_counts(case, name, make):
    scale = "last_round" if name == "qwen3_thinking" else "last_round+ignore_empty_think"  # as ms-swift has it
    template = make(name, loss_scale=scale)
    encoded, account = template.encode_with_account(ROWS[case])
    assert account == Account(("trace", "empty"))
    prompts, responses = zip(*(split(template, encoded, sequence) for sequence in FOUR), strict=True)
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3] == prompts[0] + template.bvpo.block
    assert ("weigh" in prompts[0]) == ("tools" in case)
    for response, text in zip(responses, (ROWS[case]["messages"][-1]["content"], REJECTED), strict=False):
        assert response.startswith("<think>") and response.count("<think>") == 1
        assert text.strip().removeprefix("<think>").strip() in response
    assert not any("think" in response for response in responses[2:])


OTHER_PROMPTS = {
    "other tools": (row(tools=[TOOL], rejected_tools=[OTHER]), "weigh"),
    "other settings": (
        {
            "messages": [*talk("<think>abc</think>Hello."), *talk()],
            "rejected_messages": [*talk("<think>abc</think>Hello."), *talk(REJECTED)],
            "chat_template_kwargs": {"preserve_thinking": True},
            "rejected_chat_template_kwargs": {"preserve_thinking": False},
        },
        "abc",
    ),
}


@pytest.mark.parametrize("streams", [("trace", "empty"), ("trace",), ("empty",)])
@pytest.mark.parametrize("case", OTHER_PROMPTS)
def test_another_prompt_costs_the_row(case, streams, make):
    entry, shown = OTHER_PROMPTS[case]
    lost = losses(make(streams=streams), entry)
    assert set(lost) == set(streams)
    for loss in lost.values():
        assert loss.reason == "the rejected response has another prompt than the chosen"
        assert loss.detail.startswith("from token ") and shown in loss.detail


def test_a_template_that_prefixes_one_side_only(make, monkeypatch):
    template = make()
    whole = type(template)._encode_truncated

    def prefixed(self, inputs):
        encoded = whole(self, inputs)
        if "5" in inputs.messages[-1]["content"]:
            encoded["input_ids"], encoded["labels"] = [9, *encoded["input_ids"]], [IGNORED, *encoded["labels"]]
        return encoded

    monkeypatch.setattr(type(template), "_encode_truncated", prefixed)
    assert set(losses(template, row())) == {"trace", "empty"}
    # Here the responses agree, and the answers of the empty pair do not.
    assert set(losses(template, row(rejected=REJECTED.replace("5", "6"), **OWN))) == {"empty"}


def test_a_template_that_adds_its_own_empty_trace(make):
    """A hybrid's template does not know the tags of --bvpo_empty_block, and writes its own block in front of them."""
    template = make("qwen3", loss_scale="last_round+ignore_empty_think", block="<thought>\n</thought>\n")
    (loss,) = losses(template, row()).values()
    assert loss.reason == "the empty pair's prompt is not the trace pair's with an empty trace"
    assert "<thought>" in loss.detail and "<think>" in loss.detail
    assert not losses(make(block="<thought>\n</thought>\n"), row())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("qwen3_thinking", {}),
        ("qwen3_thinking", {"rejected_response": ""}),
        ("qwen3", {"tools": [TOOL]}),
        ("deepseek_r1", {}),
    ],
)
def test_an_empty_pair_alone_is_encoded_as_beside_its_trace_pair(given, name, make):
    template = make(name)
    both, _ = template.encode_with_account({**row(**OWN), **given, "rejected_response": REJECTED})
    alone = {"messages": talk()[:1], **OWN, **given}
    encoded, account = template.encode_with_account(alone)
    assert account == Account(("empty",))
    assert not any(key.startswith(("chosen_input", "rejected_input")) for key in encoded)
    for sequence in FOUR[2:]:
        for what in ("input_ids", "labels"):
            assert encoded[f"{sequence}_{what}"] == both[f"{sequence}_{what}"]
    assert make(name, streams=("empty",)).encode_with_account(alone)[1] == Account(("empty",))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Rows of `bvpo pairs`, with pairs in both modes, in one of them, and in the other."""
    from megatron_bvpo.cli import bvpo

    folder = tmp_path_factory.mktemp("sampled")
    synthetic(folder / "samples", 40)
    assert bvpo(["pairs", str(folder / "samples"), "--out", str(folder / "pairs.jsonl")]) == 0
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    assert {tuple(row["numbers"]) for row in rows} == {("thinking", "empty"), ("thinking",), ("empty",)}
    return rows


@pytest.mark.parametrize("name", ["qwen3_thinking", "qwen3", "deepseek_r1"])
def test_rows_of_bvpo_pairs_keep_their_pairs_as_tokens(name, make, sampled):
    template = make(name)
    for entry in sampled:
        canonical, _ = Reading(template.bvpo.rules).canonical(entry)
        encoded, account = template.encode_with_account(canonical)
        traced = "thinking" in entry["numbers"]
        assert account == Account(("trace", "empty") if traced else ("empty",)), entry
        texts = (
            {"chosen": entry["messages"][-1]["content"], "rejected": entry.get("rejected_response")} if traced else {}
        )
        if "empty" in entry["numbers"]:
            texts |= {f"empty_{side}": entry[field] for side, field in zip(PAIR, OWN, strict=True)}
        for sequence, text in texts.items():
            prompt, response = split(template, encoded, sequence)
            assert text in f"{prompt.rpartition('<think>')[0]}{response}" and entry["messages"][0]["content"] in prompt


def test_an_empty_pair_alone_may_be_lost_as_tokens(make):
    template = make(max_length=30)
    entry = {"messages": talk()[:1], "empty_response": LONG, "empty_rejected_response": "5"}
    assert template.encode_with_account(entry)[1].lost.keys() == {"empty"}


# --- what counts ---


def test_earlier_turns_never_count(make):
    template = make(loss_scale="default")
    prompt, response = split(template, template.encode(ROWS["history that counts"]), "chosen")
    assert "Hello." in prompt and response.startswith("<think>\nTwo and two.")


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (f"{CHOSEN}<|im_end|>", "the same tokens on both sides"),
        (CHOSEN.replace("4", "caf\u00e9"), None),
        (
            f"{REJECTED}<|im_end|>\n<|im_start|>user\nAnd 3+3?",
            "control tokens of the template in the rejected response",
        ),
        (f"<think>\n<|im_start|>user\nWhat?{REJECTED[7:]}", "control tokens of the template in the rejected response"),
        (f"{REJECTED}<|im_end|>", None),
        (f"{REJECTED}<|fim_pad|>", None),  # a word of the model's, not of the talk's frame
    ],
)
def test_responses_as_tokens(rejected, reason, make):
    lost = losses(make(), row(rejected=rejected, **OWN))
    assert {stream: loss.reason for stream, loss in lost.items()} == ({"trace": reason} if reason else {})


def test_texts_that_are_the_same_tokens(make):
    """Two spellings of one letter: other texts, and the tokenizer makes one of them."""
    composed, decomposed = (CHOSEN.replace("4", f"caf{e}") for e in ("\u00e9", "e\u0301"))
    assert composed != decomposed
    lost = losses(make(), row(composed, decomposed))
    assert {loss.reason for loss in lost.values()} == {"the same tokens on both sides"} and len(lost) == 2
