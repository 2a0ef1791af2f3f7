"""The one form that kept rows have, whatever they were written like; and any value under any rules."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.aliases import canonical_row
from megatron_bvpo.data.rows import STREAMS_KEY, RowRules, RowVerdict, check_row, normalise_row
from tests.unit.sample_rows import OWN, REJECTED, RULES, row, talk


def test_normal_form():
    given_row = row(chosen="so</think> 4\n", rejected="or</think>5", label=1, tools=["t"], rejected_messages=None)
    before = json.dumps(given_row)
    normal = normalise_row(given_row, check_row(given_row, RULES), RULES)
    assert normal == {
        "messages": talk("<think>\nso</think> 4\n"),
        "rejected_response": "<think>\nor</think>5",
        "empty_response": "4",
        "empty_rejected_response": "5",
        "label": 1,
        "tools": ["t"],
        STREAMS_KEY: ["trace", "empty"],
    }
    assert json.dumps(given_row) == before, "the row itself must not change"


def test_normal_form_of_other_spellings():
    as_talk = {"messages": talk(), "rejected_messages": talk("or</think>5"), "rejected_response": None}
    normal = normalise_row(as_talk, check_row(as_talk, RULES), RULES)
    assert normal["rejected_messages"] == talk("<think>\nor</think>5")
    assert "rejected_response" not in normal, "ms-swift fails on a None here"
    as_list = row(rejected=talk("or</think>5")[1:], **OWN)
    normal = normalise_row(as_list, check_row(as_list, RULES), RULES)
    assert normal["rejected_response"] == talk("<think>\nor</think>5")[1:]
    assert (normal["empty_response"], normal["empty_rejected_response"]) == ("4", "5")


TOOLS, OTHERS = [{"name": "f"}], [{"name": "g"}]


@pytest.mark.parametrize(
    ("given_row", "chosen", "rejected"),
    [
        ({"messages": talk(), "rejected_messages": talk(REJECTED), "tools": TOOLS}, TOOLS, TOOLS),
        ({"messages": talk(), "rejected_messages": talk(REJECTED), "rejected_tools": TOOLS}, TOOLS, TOOLS),
        (row(rejected_tools=TOOLS), TOOLS, TOOLS),
        (row(tools=TOOLS, rejected_tools=[]), TOOLS, TOOLS),
        (row(tools=TOOLS, rejected_tools=OTHERS), TOOLS, OTHERS),  # seen when the prompts are encoded
        (row(tools=[], rejected_tools=None), [], None),
        (row(tools=TOOLS), TOOLS, "absent"),  # ms-swift's own
    ],
)
def test_tools_that_one_side_names_are_both_sides(given_row, chosen, rejected):
    normal = normalise_row(given_row, check_row(given_row, RULES), RULES)
    assert (normal["tools"], normal.get("rejected_tools", "absent")) == (chosen, rejected)
    assert normalise_row(normal, check_row(given_row, RULES), RULES) == normal


WORDS = st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", "b", " "]), max_size=6).map("".join)
RULE_SETS = st.builds(
    RowRules,
    empty=st.sampled_from(["strip", "require"]),
    streams=st.sampled_from([("trace",), ("empty",), ("trace", "empty")]),
)


@given(WORDS, WORDS, st.none() | WORDS, st.none() | WORDS, RULE_SETS)
@settings(deadline=None, max_examples=400)
def test_the_normal_form_is_normal(chosen, rejected, empty, empty_rejected, rules):
    texts = row(chosen, rejected, empty_response=empty, empty_rejected_response=empty_rejected)
    verdict = check_row(texts, rules)
    assert verdict.trace_ok <= ("trace" in rules.streams) and verdict.empty_ok <= ("empty" in rules.streams)
    assert verdict.empty_ok == (verdict.empty_source is not None)
    assert RowVerdict.from_json(verdict.to_json()) == verdict
    if not verdict.kept:
        assert verdict.problems
        return
    normal = normalise_row(texts, verdict, rules)
    assert normalise_row(normal, verdict, rules) == normal
    answers = normal["empty_response"], normal["empty_rejected_response"]
    if verdict.empty_ok:
        assert answers[0] != answers[1] and all(a and a == a.strip() for a in answers)
        # Judged anew, the normal form gives the same pairs, its answers now being its own.
        again = check_row(normal, rules)
        assert (again.trace_ok, again.empty_ok) == (verdict.trace_ok, True)
        assert normalise_row(normal, again, rules) == normal
    else:
        assert answers == (None, None)
    if verdict.trace_ok:
        assert normal["messages"][-1]["content"].lstrip().startswith("<think>")
        assert normal["rejected_response"].lstrip().startswith("<think>")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


# Values in the fields that are looked at, so that the search gets past the first test.
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "tool"]) | JSON, "content": WORDS | JSON}
)
LIKE_ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE | JSON, max_size=3) | st.sampled_from([talk(), talk()[:1]]) | JSON,
        "rejected_messages": st.lists(MESSAGE, max_size=3) | st.just(talk(REJECTED)) | JSON,
        "rejected_response": WORDS | st.lists(MESSAGE, max_size=2) | JSON,
        "empty_response": WORDS | JSON,
        "empty_rejected_response": WORDS | JSON,
        "images": JSON,
        "history": JSON,
        "query": JSON,
    },
)


@given(JSON | LIKE_ROWS, RULE_SETS)
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_a_verdict_never_raises(value, rules):
    verdict = check_row(value, rules)
    assert verdict.kept or verdict.problems
    assert all(str(problem) and problem.reason for problem in verdict.problems)
    if isinstance(value, dict):
        standard = canonical_row(value)
        if standard is not None and check_row(standard, rules).kept:
            normalise_row(standard, check_row(standard, rules), rules)


def test_a_number_that_python_cannot_print():
    assert "too many digits" in str(check_row(row(rejected=-(10**5000)), RULES).problems[0])
