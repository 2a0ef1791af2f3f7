"""Rows of the other streams: short pairs, demonstrations, single responses with labels."""

from dataclasses import replace

import pytest

from megatron_bvpo.data.rows import (
    ALONE_KEY,
    STREAMS_KEY,
    RowRules,
    RowTally,
    check_row,
    normalise_row,
    require_rows,
)
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import ORDER
from tests.unit.sample_rows import ALL, EXPERT, KTO, OWN, PROMPT, SHORT, SINGLE, row, talk

# --- what a row gives ---

# name: (row, rules, streams)
GIVES = {
    "everything": (row(**OWN, **SHORT, **EXPERT), ALL, ORDER),
    "nothing more than a pair": (row(), ALL, ("trace", "empty")),
    "blank cells": (row(**dict.fromkeys([*SHORT, *EXPERT], "")), ALL, ("trace", "empty")),
    "a short pair": (row(**SHORT), ALL, ("trace", "empty", "short")),
    "a demonstration": (row(**EXPERT), RowRules(streams=("trace", "expert")), ("trace", "expert")),
    "streams that are not run": (row(**OWN, **SHORT, **EXPERT), RowRules(streams=("short",)), ("short",)),
    "a demonstration alone": ({**PROMPT, **EXPERT}, ALL, ("expert",)),
    "a demonstration alone, own answers wanted": (
        {**PROMPT, **EXPERT},
        RowRules("require", ORDER),
        ("expert",),
    ),
    "a short pair alone": ({**PROMPT, **SHORT}, ALL, ("short",)),
    "all but a trace pair": ({**PROMPT, **OWN, **SHORT, **EXPERT}, ALL, ("empty", "short", "expert")),
    "a demonstration with an empty trace": (
        row(expert_response="<think>\n\n</think>\n\nFour."),
        ALL,
        ("trace", "empty", "expert"),
    ),
    "no demonstration in a run of them": (row(**EXPERT), RowRules(streams=("expert",)), ("expert",)),
    "one response": (SINGLE, KTO, ("trace", "empty")),
    "one response and a demonstration": ({**SINGLE, **EXPERT}, KTO, ("trace", "empty", "expert")),
    "one answer alone": ({**PROMPT, "empty_response": "4", "empty_label": 0}, KTO, ("empty",)),
    "a pair with a label": (row(label="false"), KTO, ("trace", "empty")),
}


@pytest.mark.parametrize("case", GIVES)
def test_what_a_row_gives(case):
    given_row, rules, streams = GIVES[case]
    verdict = check_row(given_row, rules)
    assert (verdict.streams, verdict.problems) == (streams, ())
    normal = normalise_row(given_row, verdict, rules)
    assert normal[STREAMS_KEY] == list(streams) and normalise_row(normal, verdict, rules) == normal
    for stream, names in (("short", SHORT), ("expert", EXPERT)):
        for name in names:
            text = normal.get(name)
            assert (text is not None) == (stream in streams) and (text or "<think>").startswith("<think>")


def test_normal_form_of_all_four():
    normal = normalise_row(row(**SHORT, **EXPERT), check_row(row(**SHORT, **EXPERT), ALL), ALL)
    assert normal == {
        **row(**EXPERT),
        "short_response": SHORT["short_response"],
        "short_rejected_response": "<think>\nHm.</think>5",
        "empty_response": "It is 4.",
        "empty_rejected_response": "It is 5.",
        STREAMS_KEY: list(ORDER),
    }


@pytest.mark.parametrize(
    ("given_row", "response", "rejected"),
    [
        ({**PROMPT, **EXPERT}, EXPERT["expert_response"], ""),
        ({**PROMPT, **SHORT, **EXPERT}, SHORT["short_response"], "<think>\nHm.</think>5"),
        ({**PROMPT, **OWN, **EXPERT}, "4", "5"),
    ],
)
def test_normal_form_without_a_trace_pair(given_row, response, rejected):
    """ms-swift wants a response on either side, and two different ones."""
    normal = normalise_row(given_row, check_row(given_row, ALL), ALL)
    assert normal["messages"] == talk(response) and normal["rejected_response"] == rejected and normal[ALONE_KEY]


# name: (row, rules, streams that are left, start of what is said, what it costs)
LOSES = {
    "half a short pair": (
        row(short_response="<think>a</think>4"),
        ALL,
        ("trace", "empty"),
        "short_rejected_response: missing, the other short response is there (give both",
        "short",
    ),
    "equal short responses": (
        row(**{**SHORT, "short_rejected_response": f" {SHORT['short_response']}"}),
        ALL,
        ("trace", "empty"),
        "short_rejected_response: the same text",
        "short",
    ),
    "a short trace cut off": (
        row(**{**SHORT, "short_response": "<think>Two"}),
        ALL,
        ("trace", "empty"),
        "short_response: no </think>",
        "short",
    ),
    "a short response of another type": (
        row(**{**SHORT, "short_response": 4}),
        ALL,
        ("trace", "empty"),
        "short_response: expected text, found the number 4",
        "short",
    ),
    "no traces in a short pair": (
        row(short_response="<think></think>4", short_rejected_response="<think></think>5"),
        ALL,
        ("trace", "empty"),
        "short_response: neither response has a trace",
        "short",
    ),
    "a demonstration without a trace": (
        row(expert_response="Four."),
        ALL,
        ("trace", "empty"),
        "expert_response: no trace, neither <think> nor </think>",
        "expert",
    ),
    "a demonstration that is no text": (
        row(expert_response=["Four."]),
        ALL,
        ("trace", "empty"),
        "expert_response: expected text, found a list",
        "expert",
    ),
    "a bad trace pair costs all": (
        row(rejected="<think>cut", **OWN, **SHORT, **EXPERT),
        ALL,
        (),
        "rejected_response: no </think>",
        "row",
    ),
    "own answers required": (row(**EXPERT), RowRules("require", ORDER), (), "empty_response: missing", "row"),
    "a bad demonstration alone": (
        {**PROMPT, "expert_response": "<think>cut"},
        ALL,
        (),
        "expert_response: no </think>",
        "row",
    ),
    "a demonstration that nobody runs": (
        {**PROMPT, **EXPERT},
        RowRules(),
        (),
        "expert_response: a demonstration alone, and no expert stream is run (add a trace pair, or run the expert",
        "row",
    ),
    "no demonstration": (
        row(),
        RowRules(streams=("expert",)),
        (),
        "expert_response: missing, and the row has nothing else to train",
        "row",
    ),
    "no label": (
        {"messages": talk()},
        KTO,
        (),
        "label: missing, and this --loss_type takes single responses, right or wrong (say true or false, or choose",
        "row",
    ),
    "an odd label": ({**SINGLE, "label": "good"}, KTO, (), "label: expected true or false, found text 'good'", "row"),
    "an own answer without a label": (
        {**SINGLE, "empty_response": "4"},
        KTO,
        ("trace",),
        "empty_label: missing",
        "empty",
    ),
    "a rejected answer alone": (
        {**PROMPT, "empty_rejected_response": "4", "label": 1},
        KTO,
        (),
        "empty_response: missing",
        "row",
    ),
    "an answer required": (SINGLE, replace(KTO, empty="require"), (), "empty_response: missing", "row"),
    "a response cut off": ({"messages": talk("<think>so"), "label": 0}, KTO, (), "messages: no </think>", "row"),
}


@pytest.mark.parametrize("case", LOSES)
def test_what_a_row_loses(case):
    given_row, rules, streams, told, drops = LOSES[case]
    verdict = check_row(given_row, rules)
    assert verdict.streams == streams
    problem = verdict.problems[0]
    assert str(problem).startswith(told) and problem.drops == drops
    assert verdict.lost == ({drops: problem} if streams else {})
    if streams:
        assert normalise_row(given_row, verdict, rules)[STREAMS_KEY] == list(streams)


def test_two_losses_of_one_row_are_both_counted():
    tally = RowTally()
    tally.add(check_row(row(empty_response="4", short_response="<think>a</think>4", **EXPERT), ALL))
    assert tally.lines() == [
        "1 row read, 1 kept.",
        "1 trace pair, 0 empty pairs (0 with their own answers, 0 with stripped answers), 1 demonstration.",
        "1 row kept without the empty pair:",
        "  1 × empty_rejected_response: missing, the other empty answer is there",
        "1 row kept without the short pair:",
        "  1 × short_rejected_response: missing, the other short response is there",
    ]


def test_each_stream_in_use_must_have_something():
    tally = RowTally()
    tally.add(check_row(row(), ALL))
    with pytest.raises(UserError, match="no short pair is left in 1 row"):
        require_rows(tally, ["a.jsonl"], ALL)
    tally.add(check_row(row(**SHORT), ALL))
    with pytest.raises(UserError, match="no demonstration is left in 2 rows"):
        require_rows(tally, ["a.jsonl"], ALL)
    tally.add(check_row({**PROMPT, **EXPERT}, ALL))
    require_rows(tally, ["a.jsonl"], ALL)
    assert "1 row with a demonstration alone." in tally.lines()


# --- single responses ---


@pytest.mark.parametrize(
    ("value", "right"),
    [(True, True), (False, False), (1, True), (0, False), ("True", True), (" false", False), ("1.0", True)],
)
def test_labels(value, right):
    single = {**SINGLE, "label": value}
    verdict = check_row(single, KTO)
    assert verdict.right == (("trace", "empty") if right else ())
    normal = normalise_row(single, verdict, KTO)
    assert (normal["label"], normal["empty_label"]) == (right, right)
    assert (normal["empty_response"], normal["empty_rejected_response"]) == ("It is 4.", None)
    assert normal["rejected_response"] == "" and "rejected_messages" not in normal


def test_an_own_answer_has_a_label_of_its_own():
    single = {**SINGLE, "empty_response": "<think>\n\n</think>\n\n5", "empty_label": False}
    verdict = check_row(single, KTO)
    assert (verdict.right, verdict.empty_source) == (("trace",), "own")
    normal = normalise_row(single, verdict, KTO)
    assert (normal["label"], normal["empty_label"], normal["empty_response"]) == (True, False, "5")


def test_the_rejected_side_of_a_pair_is_no_single_response():
    entry = {"messages": talk(), "rejected_messages": talk("<think>"), "label": True}
    normal = normalise_row(entry, check_row(entry, KTO), KTO)
    assert normal["rejected_response"] == "" and "rejected_messages" not in normal


def test_the_count_of_single_responses():
    tally = RowTally()
    for entry in (SINGLE, {**SINGLE, "label": False, "empty_response": "4", "empty_label": True}, {"messages": talk()}):
        tally.add(check_row(entry, KTO))
    assert tally.lines() == [
        "3 rows read, 2 kept.",
        "2 trace responses (1 right, 1 wrong), 2 empty responses (2 right, 0 wrong; 1 with their own answers, 1 with "
        "stripped answers).",
        "1 row dropped:",
        "  1 × label: missing, and this --loss_type takes single responses, right or wrong",
    ]
    other = RowTally()
    other.add(check_row(SINGLE, KTO))
    assert tally.merge(other).right == {"trace": 2, "empty": 3}
    assert RowTally().merge(tally).lines() == tally.lines()


def test_a_stream_without_labels_is_refused():
    with pytest.raises(UserError, match="--bvpo_streams: rows have no label for the stream short"):
        RowRules(streams=("trace", "short"), unpaired=True)
