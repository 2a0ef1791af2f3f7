"""Rows before training: which are dropped, which lose their empty pair, which are good."""

from dataclasses import replace

import pytest

from megatron_bvpo.data.rows import ALONE_KEY, RowRules, RowTally, RowVerdict, check_row, normalise_row
from megatron_bvpo.errors import UserError
from tests.unit.sample_rows import ALONE, CHOSEN, OWN, REJECTED, RULES, row, talk


def without(name, **more):
    return {key: value for key, value in row(**more).items() if key != name}


# --- rows that are dropped, or lose their empty pair ---

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "tool_call", "content": "{}"}

SPEAKS = "Open with <think>, write 0, and close with </think> before the answer."


# name: (row, field of the problem, fragments of problem and remedy)
DROPPED = {
    "no object": ([], "row", ["expected an object"]),
    "nothing": ({}, "messages", ["missing"]),
    "messages null": ({**row(), "messages": None}, "messages", ["missing"]),
    "messages empty": ({**row(), "messages": []}, "messages", ["empty"]),
    "no user": ({**row(), "messages": talk()[1:]}, "messages", ["no user turn"]),
    "ends with the user": ({**row(), "messages": talk()[:1]}, "messages", ["last message", "'user'"]),
    "two responses": ({**row(), "messages": [*talk(), talk()[1]]}, "messages", ["several messages", "join"]),
    "no role": ({**row(), "messages": [{"content": "q"}]}, "messages[0].role", ["missing"]),
    "unknown role": (
        {**row(), "messages": [{"role": "boss", "content": "q"}]},
        "messages[0].role",
        ["unknown role, found 'boss'", "user, assistant or system"],
    ),
    "late system": ({**row(), "messages": [talk()[0], SYSTEM, talk()[1]]}, "messages[1].role", ["first"]),
    "no content": ({**row(), "messages": [{"role": "user"}]}, "messages[0].content", ["missing"]),
    "tool call": ({**row(), "messages": [talk()[0], CALL, talk()[1]]}, "messages", ["tool calls"]),
    "openai tool call": (
        {**row(), "messages": [talk()[0], {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "messages",
        ["tool calls in the response", "leave the row out"],
    ),
    "rejected tool call": (row(rejected=[CALL, talk()[1]]), "rejected_response", ["tool calls"]),
    "rejected missing": (without("rejected_response"), "rejected_response", ["missing", "leave the row out"]),
    "rejected null": (row(rejected=None), "rejected_response", ["missing"]),
    "rejected empty list": (row(rejected=[]), "rejected_response", ["empty"]),
    "rejected with a user turn": (row(rejected=talk()), "rejected_response", ["rejected_messages"]),
    "rejected with another prompt": (
        {"messages": talk(), "rejected_messages": talk(REJECTED, prompt="What is 3+3?")},
        "rejected_messages",
        ["another prompt than in messages"],
    ),
    "rejected without the system message": (
        {"messages": [SYSTEM, *talk()], "rejected_messages": talk(REJECTED)},
        "rejected_messages",
        ["system message included"],
    ),
    "two rejected responses": (
        row(rejected_messages=talk("<think>x</think>6")),
        "rejected_messages",
        ["another response", "one of the two"],
    ),
    "images": (row(images=["a.png"]), "images", ["only text rows"]),
    "rejected images": (row(rejected_images=["a.png"]), "rejected_images", ["only text rows"]),
    "no trace": (row(chosen="It is 4."), "messages", ["no trace", "thinking on"]),
    "no trace rejected": (row(rejected="It is 5."), "rejected_response", ["no trace", "generation limit"]),
    "cut off": (row(rejected="<think>\nA gu"), "rejected_response", ["no </think>", "cut off", "raise"]),
    "cut off, opened late": (row(rejected="Hm. <think>\nA gu"), "rejected_response", ["no </think> (gen"]),
    "cut off again": (
        row(chosen="<think>a</think>\n<think>b"),
        "messages",
        ["no </think> after the second <think>"],
    ),
    "blank": (row(chosen=" \n"), "messages", ["blank response"]),
    "blank rejected": (row(rejected=""), "rejected_response", ["blank response"]),
    "nothing but tags": (row(rejected="<think>\n</think>\n"), "rejected_response", ["blank response"]),
    "equal": (row(rejected=CHOSEN), "rejected_response", ["the same text"]),
    "equal but for the prefix": (row(rejected=CHOSEN[8:]), "rejected_response", ["the same text"]),
    "equal but for white space": (row(rejected=f"{CHOSEN}\n"), "rejected_response", ["the same text"]),
    "opened twice": (row(chosen="<think>\n<think>a</think>4"), "messages", ["<think> twice at the start", "once"]),
    "the prompt once more": (
        row(rejected=f"What is 2+2?{REJECTED}"),
        "rejected_response",
        ["text in front of <think>"],
    ),
    "a trace only if its answer is one": (
        row("<think></think>Close with </think>!", "<think></think>5"),
        "messages",
        ["neither response has a trace"],
    ),
    "chosen that does not count": (
        {**row(), "messages": [talk()[0], {**talk()[1], "loss": False}]},
        "messages",
        ["loss on the response is not true, found true or false", "take loss off"],
    ),
    "a word for false": (
        {**row(), "messages": [talk()[0], {**talk()[1], "loss": "false"}]},
        "messages",
        ["loss on the response is not true, found text 'false'"],
    ),
    "rejected that does not count": (
        row(rejected=[{**talk(REJECTED)[1], "loss": 0}]),
        "rejected_response",
        ["loss on the response", "the number 0"],
    ),
    "rejected that counts half": (
        {"messages": talk(), "rejected_messages": [talk()[0], {**talk(REJECTED)[1], "loss_scale": 0.5}]},
        "rejected_messages",
        ["loss_scale on the response is not 1", "the number 0.5"],
    ),
    "an earlier answer that speaks of tags": (
        {**row(), "messages": [*talk(SPEAKS), *talk()]},
        "messages[1].content",
        ["text in front of <think>", "earlier turns without their traces"],
    ),
    "an earlier turn with several ends": (
        {**row(), "messages": [*talk(f"<think>a</think>{SPEAKS}"), *talk()]},
        "messages[1].content",
        ["more than one </think>"],
    ),
    "both traces empty": (
        row("<think></think>4", "<think>\n</think>5"),
        "messages",
        ["neither", "empty_resp"],
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_dropped_row(case):
    bad, field, fragments = DROPPED[case]
    verdict = check_row(bad, RULES)
    assert not verdict.kept and not verdict.trace_ok and not verdict.empty_ok and verdict.empty_source is None
    problem = verdict.problems[0]
    assert (problem.field, problem.drops) == (field, "row")
    for fragment in fragments:
        assert fragment in str(problem)


EMPTY_LOST = {
    "only one own answer": (row(empty_response="4"), "empty_rejected_response", ["missing", "both"]),
    "only the other one": (row(empty_rejected_response="5"), "empty_response", ["missing"]),
    "equal own answers": (
        row(empty_response="4", empty_rejected_response=" 4\n"),
        "empty_rejected",
        ["same"],
    ),
    "blank own answer": (row(empty_response="\n", empty_rejected_response="5"), "empty_response", ["blank"]),
    "block and nothing": (
        row(empty_response="4", empty_rejected_response="<think>\n\n</think>\n\n"),
        "empty_rejected_response",
        ["blank"],
    ),
    "own answer with a trace": (
        row(empty_response="<think>so</think>4", empty_rejected_response="5"),
        "empty_response",
        ["holds a trace", "thinking off"],
    ),
    "own answer cut off": (row(**{**OWN, "empty_response": "<think>so"}), "empty_response", ["a trace"]),
    "own answer of another type": (row(**{**OWN, "empty_response": 4}), "empty_response", ["expected text"]),
    "own answer that speaks of tags": (
        row(**{**OWN, "empty_response": SPEAKS}),
        "empty_response",
        ["holds a trace, or speaks of </think>"],
    ),
    "no answer to strip": (row(chosen="<think>so</think>\n"), "messages", ["no answer after </think>"]),
    "equal stripped answers": (
        row(rejected="<think>hm</think> It is 4."),
        "rejected_response",
        ["the same answer", "add empty_response"],
    ),
}


@pytest.mark.parametrize("case", EMPTY_LOST)
def test_lost_empty_pair(case):
    bad, field, fragments = EMPTY_LOST[case]
    verdict = check_row(bad, RULES)
    assert verdict.trace_ok and not verdict.empty_ok and verdict.empty_source is None
    problem = verdict.problems[0]
    assert problem.field.startswith(field) and problem.drops == "empty"
    for fragment in fragments:
        assert fragment in str(problem)
    normal = normalise_row(bad, verdict, RULES)
    assert (normal["empty_response"], normal["empty_rejected_response"]) == (None, None)
    # The same fault costs the whole row where the empty pair is all there is, and nothing where it is unused.
    assert not check_row(bad, RowRules(streams=("empty",))).kept
    assert check_row(bad, RowRules(streams=("trace",))) == RowVerdict(("trace",))


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        (row(chosen=f"<think>\nHm.\n</think>\n\n{SPEAKS}"), "messages"),
        (row(chosen="<think>say </think> and</think>4"), "messages"),
        (row(rejected=f"Hm.\n</think>\n\n{SPEAKS}"), "rejected_response"),
    ],
)
def test_an_answer_that_cannot_be_told_from_its_trace(entry, field):
    """It loses the stripped answers, not its whole responses, and none of its own answers."""
    verdict = check_row(entry, RULES)
    assert (verdict.trace_ok, verdict.empty_ok, verdict.many_tags) == (True, False, True)
    (problem,) = verdict.problems
    assert problem.field == field and problem.drops == "empty"
    assert "more than one </think>, so where the answer begins cannot be told" in str(problem)
    assert check_row({**entry, **OWN}, RULES) == RowVerdict(("trace", "empty"), "own", many_tags=True)
    assert not check_row(entry, RowRules(streams=("empty",))).kept
    assert check_row(entry, RowRules(streams=("trace",))) == RowVerdict(("trace",), many_tags=True)
    tally = RowTally()
    tally.add(verdict)
    tally.merge(tally)
    assert "2 rows with an opening or closing tag twice or more in a response." in tally.lines()


def test_require_refuses_rows_without_own_answers():
    rules = RowRules(empty="require")
    verdict = check_row(row(), rules)
    assert not verdict.kept and "--bvpo_empty require" in str(verdict.problems[0])
    assert check_row(row(**OWN), rules) == RowVerdict(("trace", "empty"), "own")
    assert check_row(row(empty_response="4"), rules).trace_ok, "half an own pair loses the empty pair only"
    assert check_row(row(), RowRules(empty="require", streams=("trace",))).kept


def test_own_keeps_the_trace_pair_of_rows_without_own_answers():
    rules = RowRules(empty="own")
    verdict = check_row(row(), rules)
    assert (verdict.trace_ok, verdict.empty_ok) == (True, False)
    assert "--bvpo_empty own" in str(verdict.problems[0])
    assert check_row(row(**OWN), rules) == RowVerdict(("trace", "empty"), "own")
    assert not check_row(row(), RowRules(empty="own", streams=("empty",))).kept, "nothing is left to train"


def test_unknown_rule_is_refused():
    with pytest.raises(UserError, match="--bvpo_empty: expected strip, require or own, found 'skip'"):
        RowRules(empty="skip")


@pytest.mark.parametrize(
    ("good", "source"),
    [
        (row(), "stripped"),
        (row(**OWN), "own"),
        (row(empty_response=None, empty_rejected_response=None), "stripped"),
        (row(empty_response="<think>\n\n</think>\n\n4", empty_rejected_response="5"), "own"),
        (row(chosen="so</think>4"), "stripped"),
        (row(chosen="<think></think>4"), "stripped"),
        (row(rejected=[{"role": "assistant", "content": REJECTED}]), "stripped"),
        (row(rejected_messages=talk(REJECTED)), "stripped"),
        (row(chosen="<think>so</think>4, behind <think>"), "stripped"),
        (row(rejected=[{**talk(REJECTED)[1], "loss": True, "loss_scale": 1.0}]), "stripped"),
        ({**row(), "messages": [*talk("<think>a</think>b"), *talk()]}, "stripped"),
        (row(rejected_messages=None, images=[], videos=None, tools=[{"name": "f"}], label=1), "stripped"),
        ({"messages": [SYSTEM, *talk()], "rejected_messages": [SYSTEM, *talk(REJECTED)]}, "stripped"),
        ({"messages": [*talk(), CALL, *talk()], "rejected_response": REJECTED}, "stripped"),
    ],
)
def test_good_row(good, source):
    assert replace(check_row(good, RULES), many_tags=False) == RowVerdict(("trace", "empty"), source)


def test_a_stream_that_is_not_used_asks_nothing():
    only_empty = RowRules(streams=("empty",))
    no_traces = row(chosen="4", rejected="5")
    assert check_row(no_traces, only_empty) == RowVerdict(("empty",), "stripped")
    assert check_row(row(chosen="<think>cut", **OWN), only_empty) == RowVerdict(("empty",), "own")
    assert not check_row(row(chosen="<think>cut"), only_empty).kept
    # 'It is 5, or' may be a trace that was cut off before its closing tag.
    assert "has one" in str(check_row(row(rejected="It is 5, or"), only_empty).problems[0])


# --- an empty pair alone ---


BLOCKED = {"empty_response": "<think>\n\n</think>\n\n4", "empty_rejected_response": "5"}


@pytest.mark.parametrize("given_row", [ALONE, {**ALONE, "rejected_response": ""}, {"messages": talk()[:1], **BLOCKED}])
@pytest.mark.parametrize("rules", [RULES, RowRules("require"), RowRules(streams=("empty",))])
def test_an_empty_pair_alone(given_row, rules):
    verdict = check_row(given_row, rules)
    assert verdict == RowVerdict(("empty",), "own", many_tags=verdict.many_tags)
    normal = normalise_row(given_row, verdict, rules)
    assert normal["messages"] == talk("4") and normal["rejected_response"] == "5" and normal[ALONE_KEY]
    assert (normal["empty_response"], normal["empty_rejected_response"]) == ("4", "5")
    assert normalise_row(normal, verdict, rules) == normal


NOT_ALONE = {
    "trace stream only": (ALONE, RowRules(streams=("trace",)), "empty_response: an empty pair alone, and no empty"),
    "one answer": ({**ALONE, "empty_response": None}, RULES, "empty_response: missing, the other empty answer"),
    "no answer": ({"messages": talk()[:1]}, RULES, "messages: the last message is not the assistant's"),
    "equal": ({**ALONE, "empty_response": "5 "}, RULES, "empty_rejected_response: the same text as empty_response"),
    "thinks": ({**ALONE, "empty_response": CHOSEN}, RULES, "empty_response: holds a trace"),
    "a number": ({**ALONE, "empty_response": 4}, RULES, "empty_response: expected text"),
    "a rejected side": ({**ALONE, "rejected_response": REJECTED}, RULES, "messages: the last message is not"),
    "images": ({**ALONE, "images": ["a.png"]}, RULES, "images: not empty"),
    "no prompt": ({**ALONE, "messages": [{"role": "user"}]}, RULES, "messages[0].content: missing"),
    "system alone": ({**ALONE, "messages": [SYSTEM]}, RULES, "messages: no user turn"),
    "tool turn": ({**ALONE, "messages": [*talk()[:1], {"role": "tool", "content": "x"}]}, RULES, "messages: tool"),
    "bad history": (
        {**ALONE, "messages": [*talk(f"<think>a</think>{SPEAKS}"), *talk()[:1]]},
        RULES,
        "messages[1].content: more than one </think>",
    ),
}


@pytest.mark.parametrize("case", NOT_ALONE)
def test_an_empty_pair_alone_that_is_none(case):
    given_row, rules, told = NOT_ALONE[case]
    verdict = check_row(given_row, rules)
    assert not verdict.kept and verdict.empty_source is None
    assert verdict.problems[0].drops == "row" and str(verdict.problems[0]).startswith(told)


@pytest.mark.parametrize("blank", [{"empty_response": ""}, {"empty_rejected_response": "", "empty_response": None}])
def test_a_blank_cell_beside_a_missing_column_is_no_answer(blank):
    assert check_row(row(**blank), RULES).empty_source == "stripped"
