"""Rows as public data sets and servers write them: what is read, what is refused, and with which remedy."""

import json

import pytest

from megatron_bvpo.data.aliases import canonical_row
from megatron_bvpo.data.columns import unknown_form
from megatron_bvpo.data.empty_trace import ThinkTags
from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.rows import check_row
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.start_checks import scan_data
from tests.unit.sample_rows import CHOSEN, REJECTED, RULES, row, talk

READING = Reading(RULES)
USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TRACE, ANSWER = "Two and two.", "It is 4."


def said(text=CHOSEN, role="assistant"):
    return {"role": role, "content": text}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


# name: (row, the messages' prompt)
READ = {
    "two conversations": ({"chosen": talk(), "rejected": talk(REJECTED)}, [USER]),
    "conversations of from and value": (
        {
            side: [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": text}]
            for side, text in (("chosen", CHOSEN), ("rejected", REJECTED))
        },
        [USER],
    ),
    "conversations as text": ({"chosen": json.dumps(talk()), "rejected": str(talk(REJECTED))}, [USER]),
    "conversations and their prompt": (
        {"prompt": "What is 2+2?", "chosen": talk(), "rejected": talk(REJECTED), "score_chosen": 8.0},
        [USER],
    ),
    "conversations and the chosen one again": (
        {"messages": talk(), "chosen": talk(), "rejected": talk(REJECTED)},
        [USER],
    ),
    "a prompt and two texts": ({"prompt": "What is 2+2?", "chosen": CHOSEN, "rejected": REJECTED}, [USER]),
    "a prompt of messages": ({"prompt": [SYSTEM, USER], "chosen": [said()], "rejected": [said(REJECTED)]}, None),
    "messages and two texts": ({"messages": [SYSTEM, USER], "chosen": CHOSEN, "rejected": REJECTED}, None),
    "conversations and two messages": (
        {
            "conversations": [{"from": "human", "value": "What is 2+2?"}],
            "chosen": {"from": "gpt", "value": CHOSEN},
            "rejected": {"from": "gpt", "value": REJECTED},
        },
        [USER],
    ),
    "a question with a system prompt": (
        {"system": "Be brief.", "question": "What is 2+2?", "chosen": CHOSEN, "rejected": REJECTED},
        None,
    ),
    "instruction and responses": (
        {"instruction": "What is 2+2?", "chosen_response": CHOSEN, "rejected_response": REJECTED},
        [USER],
    ),
    "instruction, input and sides": (
        {"instruction": "What is", "input": "2+2?", "chosen": CHOSEN, "rejected": REJECTED},
        [{"role": "user", "content": "What is\n2+2?"}],
    ),
    "ranked completions": (
        {
            "context": [USER],
            "completions": [
                {"rank": 1, "completion": [said(REJECTED)]},
                {"rank": 0, "completion": [said()]},
            ],
        },
        [USER],
    ),
    "ranked completions of a text": (
        {
            "context": "What is 2+2?",
            "completions": [{"rank": 0, "completion": [said()]}, {"rank": 1, "completion": [said(REJECTED)]}],
        },
        [USER],
    ),
    "a null rejected_response beside the conversation": (
        {"messages": talk(), "rejected_response": None, "rejected_messages": talk(REJECTED)},
        [USER],
    ),
    "a blank cell beside the conversation": (
        {"messages": talk(), "rejected_response": "", "rejected_messages": json.dumps(talk(REJECTED))},
        [USER],
    ),
    "a blank conversation beside the response": (row(rejected_messages=""), [USER]),
    "the role developer": (
        {**row(), "messages": [{"role": "developer", "content": "Be brief."}, *talk()]},
        None,
    ),
    "parts of text": (
        {
            "messages": [said(parts("What is ", "2+2?"), "user"), said(parts(CHOSEN))],
            "rejected_response": [said(parts(REJECTED))],
        },
        [USER],
    ),
    "a rejected list of from and value": (row(rejected=[{"from": "gpt", "value": REJECTED}]), [USER]),
    "one rejected text in a list": (row(rejected=[REJECTED]), [USER]),
    "one rejected message": (row(rejected=said(REJECTED)), [USER]),
    "blank images": (row(images="", videos=[], audios=[""], rejected_images=[{"bytes": None, "path": ""}]), [USER]),
    "images of an empty list as text": (row(images="[]"), [USER]),
    "null keys, as tables pad messages": (
        {**row(), "messages": [{**m, "name": None, "tool_calls": None} for m in talk()]},
        [USER],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_read(case):
    given, prompt = READ[case]
    before = json.dumps(given)
    new, verdict = READING.canonical(given)
    assert verdict.kept, verdict.problems
    assert new["messages"] == [*(prompt or [SYSTEM, USER]), said()]
    assert new["rejected_response"] == REJECTED and new["rejected_messages"] is None
    assert json.dumps(given) == before, "the row was changed"


REASONING = {
    "reasoning_content in the messages": {
        "messages": [USER, {**said(ANSWER), "reasoning_content": TRACE}],
        "rejected_response": REJECTED,
    },
    "reasoning in the messages": {
        "messages": [USER, {**said(ANSWER), "reasoning": TRACE}],
        "rejected_response": REJECTED,
    },
    "in chosen": {"chosen": [USER, {**said(ANSWER), "reasoning": TRACE}], "rejected": talk(REJECTED)},
    "null beside a whole content": {
        "messages": [USER, {**said(), "reasoning_content": None}],
        "rejected_response": REJECTED,
    },
    "beside a content that holds it": {
        "messages": [USER, {**said(), "reasoning_content": TRACE}],
        "rejected_response": REJECTED,
    },
    "in columns": {
        "messages": [USER, said(ANSWER)],
        "reasoning_content": TRACE,
        "rejected_response": "It is 5.",
        "rejected_reasoning_content": "A guess.",
    },
    "in columns of a query": {
        "query": "What is 2+2?",
        "response": ANSWER,
        "reasoning": TRACE,
        "rejected_response": "It is 5.",
        "rejected_reasoning": "A guess.",
    },
    "in the rejected list": {
        "messages": talk(),
        "rejected_response": [{**said("It is 5."), "reasoning": "A guess."}],
    },
    "in the rejected conversation": {
        "messages": talk(),
        "rejected_messages": [USER, {**said("It is 5."), "reasoning_content": "A guess."}],
    },
}


@pytest.mark.parametrize("case", REASONING)
def test_a_trace_beside_the_answer(case):
    new, verdict = READING.canonical(REASONING[case])
    assert verdict.trace_ok and new["messages"] == talk() and new["rejected_response"] == REJECTED


def test_a_trace_beside_the_answer_takes_the_tags_of_the_rules():
    tags = ThinkTags("<thought>", "</thought>")
    standard = canonical_row({**row(), "messages": [USER, {**said(ANSWER), "reasoning": TRACE}]}, tags=tags)
    assert standard["messages"][-1]["content"] == "<thought>\nTwo and two.\n</thought>\n\nIt is 4."


def test_a_trace_without_an_answer_was_cut_off():
    cut = {**row(), "messages": [USER, {"role": "assistant", "content": None, "reasoning_content": TRACE}]}
    assert "cut off" in str(READING.canonical(cut)[1].problems[0])


def test_a_column_of_somebodys_reasons_is_no_trace():
    judged = row(chosen=ANSWER, reasoning="The first is right.")
    assert READING.canonical(judged)[1].problems[0].reason == "messages: no trace, neither <think> nor </think>"


# name: (row, fragments of what is said)
REFUSED = {
    "more than two completions": (
        {
            "context": [USER],
            "completions": [{"rank": i, "completion": [said(text)]} for i, text in enumerate((CHOSEN, REJECTED, "x"))],
        },
        ["several responses in one list, found 2", "write a row for each"],
    ),
    "equal ranks": (
        {"context": [USER], "completions": [{"rank": 0, "completion": [said()]}] * 2},
        ["no messages and no pair", "context, completions"],
    ),
    "whole texts without a prompt": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ["no messages and no pair of responses, found chosen, rejected"],
    ),
    "two different chosen conversations": (
        {"messages": talk("<think>x</think>y"), "chosen": talk(), "rejected": talk(REJECTED)},
        ["rejected_response: missing"],
    ),
    "an image among the parts": (
        {**row(), "messages": [said([{"type": "image", "image": "a.png"}, *parts("?")], "user"), said()]},
        ["expected text, found a list"],
    ),
    "an image": (row(images=["a.png"]), ["images: not empty"]),
    "an image as an object": (row(images=[{"bytes": None, "path": "a.png"}]), ["images: not empty"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    given, fragments = REFUSED[case]
    new, verdict = READING.canonical(given)
    assert not verdict.kept and not new
    for fragment in fragments:
        assert fragment in str(verdict.problems[0])


# --- --columns ---

OTHER_NAMES = {
    "prompt, good, bad": {"my_prompt": "q", "good_answer": CHOSEN, "bad_answer": REJECTED},
    "conversations by other names": {"winner": talk(), "loser": talk(REJECTED)},
    "a dialogue and a text": {"dialogue": talk(), "worse": REJECTED},
    "a dialogue and a conversation": {"dialogue": talk(), "worse": talk(REJECTED)},
    "a prompt of messages": {"context_turns": [SYSTEM, USER], "accepted": [said()], "refused_bad": [said(REJECTED)]},
    "a score beside": {"task": "q", "best": CHOSEN, "worst": REJECTED, "best_score": 3.0, "id": 7},
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_the_columns_that_are_named_work_for_this_very_row(case):
    given = OTHER_NAMES[case]
    assert READING.canonical(given)[1].problems[0].field == "columns"
    remedy = unknown_form(given, READING).remedy
    columns = json.loads(remedy.split("--columns '")[1].removesuffix("'."))
    assert Reading(RULES, columns).canonical(given)[1].kept


def test_names_that_say_nothing():
    remedy = unknown_form({"a": CHOSEN, "b": REJECTED}, READING).remedy
    assert "{" not in remedy and "--columns" in remedy


def test_a_column_that_is_mapped_to_takes_the_place_of_one_that_is_there():
    """ms-swift ends with a KeyError of datasets."""
    given = row(rejected="not this one", worse=REJECTED)
    new, verdict = Reading(RULES, {"WORSE": "rejected_response"}).canonical(given)
    assert verdict.kept and new["rejected_response"] == REJECTED


@pytest.mark.parametrize("value", ["a:b", "[1]", '{"a": 1}', "{", "nowhere.json"])
def test_columns_that_are_no_mapping_are_told_with_the_flag(value):
    with pytest.raises(UserError, match="expected a JSON object") as caught:
        scan_data(["--dataset", "a.jsonl", "--columns", value])
    assert caught.value.field == "--columns" and caught.value.remedy


def test_columns_are_read_as_ms_swift_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk(), "worse": REJECTED}) + "\n")
    (tmp_path / "columns.json").write_text('{"worse": "rejected_response"}')
    for value in ("{'worse': 'rejected_response'}", str(tmp_path / "columns.json")):
        lines = scan_data(["--dataset", str(tmp_path / "a.jsonl"), "--columns", value])
        assert "1 row read, 1 kept." in lines


def test_a_margin_is_nobodys_business():
    """ms-swift drops a row whose margin is no number, although only its reward models read it."""
    from megatron_bvpo.data.rows import normalise_row

    given = row(margin="N/A")
    assert "margin" not in normalise_row(given, check_row(given, RULES), RULES)
    assert "margin" not in READING.canonical(given)[0]
