"""Traces, answers and empty think blocks as texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.empty_trace import (
    DEFAULT_EMPTY_BLOCK,
    ThinkTags,
    empty_block,
    has_open_think,
    many_tags,
    own_answer,
    split_trace,
    strip_answer,
    unclear_opening,
    with_think_prefix,
)
from megatron_bvpo.errors import UserError

# Texts in which tags turn up often and in any order.
PIECES = st.sampled_from(["<think>", "</think>", "\n", " ", "a", "so 2+2", "<th", "é", "\u2028"])
TEXTS = st.lists(PIECES, max_size=8).map("".join) | st.text()
PLAIN = TEXTS.filter(lambda text: "<think>" not in text and "</think>" not in text)


@pytest.mark.parametrize(
    ("text", "trace", "answer", "opened", "closed"),
    [
        ("<think>\nr\n</think>\n\ny", "\nr\n", "\n\ny", True, True),
        ("r\n</think>\n\ny", "r\n", "\n\ny", False, True),
        ("</think>y", "", "y", False, True),
        ("<think>r", "r", "", True, False),
        ("y", "", "y", False, False),
        ("", "", "", False, False),
        # The last closing tag ends the trace.
        ("<think>say </think> now</think>y", "say </think> now", "y", True, True),
        # A tag inside the trace opens nothing.
        ("the <think> tag</think>y", "the <think> tag", "y", False, True),
        (" \n<think>r</think>y", "r", "y", True, True),
    ],
)
def test_split(text, trace, answer, opened, closed):
    parts = split_trace(text)
    assert (parts.trace, parts.answer, parts.opened, parts.closed) == (trace, answer, opened, closed)
    assert parts.cut_off == (opened and not closed)


@given(PLAIN, PLAIN)
@settings(deadline=None)
def test_a_response_is_put_together_and_taken_apart(trace, answer):
    parts = split_trace(f"<think>{trace}</think>{answer}")
    assert (parts.trace, parts.answer) == (trace, answer)


@given(TEXTS)
@settings(deadline=None)
def test_splitting_loses_nothing(text):
    parts = split_trace(text)
    opening = text[: text.index("<think>") + 7] if parts.opened else ""
    assert opening + parts.trace + ("</think>" if parts.closed else "") + parts.answer == text


@given(TEXTS.filter(lambda text: "</think>" in text))
@settings(deadline=None)
def test_answers_are_what_ms_swift_leaves_of_a_text(text):
    assert strip_answer(text) == text.split("</think>")[-1].strip()


def test_answer_of_a_cut_off_trace_is_empty():
    assert strip_answer("<think>\nand then") == ""


@given(TEXTS)
@settings(deadline=None)
def test_prefix_is_put_once(text):
    once = with_think_prefix(text)
    assert with_think_prefix(once) == once
    assert strip_answer(once) == strip_answer(text)
    assert once in (text.lstrip() if has_open_think(text) else text, "<think>\n" + text)
    if "</think>" in text:
        assert has_open_think(once)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r</think>y", "<think>\nr</think>y"),
        ("a <think> tag</think>y", "<think>\na <think> tag</think>y"),
        ("<think>r</think>y", "<think>r</think>y"),
        # ms-swift looks for the tag at the very start, and puts an empty block in front of what it does not see.
        ("\n<think>r</think>y", "<think>r</think>y"),
        ("y", "y"),
        ("<think>cut", "<think>cut"),
    ],
)
def test_prefix(text, expected):
    assert with_think_prefix(text) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("<think>r</think>y", None),
        ("r</think>y", None),
        ("y", None),
        ("<think>the <think> tag</think>y", None),
        ("r</think>put <think> first", None),
        ("<think>r</think>put <think> and </think>", None),
        ("<think>\n<think>r</think>y", "<think> twice at the start"),
        (" <think><think>", "<think> twice at the start"),
        ("What is 2+2?\n<think>\nr</think>y", "text in front of <think>"),
        ("the <think> tag</think>y", "text in front of <think>"),
    ],
)
def test_where_a_trace_opens(text, wrong):
    assert unclear_opening(text) == wrong


@pytest.mark.parametrize(
    ("text", "many"),
    [("<think>r</think>y", False), ("y", False), ("<think><think>", True), ("a</think>b</think>", True)],
)
def test_many_tags(text, many):
    assert many_tags(text) == many


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("y", "y"),
        ("\n y \n", "y"),
        ("<think>\n\n</think>\n\ny", "y"),
        ("</think>y", "y"),
        ("", ""),
        ("<think>r</think>y", None),
        ("r</think>y", None),
        ("<think>r", None),
        ("<think>", None),
        ("<think></think>x</think>y", None),
    ],
)
def test_own_answer(text, answer):
    assert own_answer(text) == answer


def test_other_tags():
    tags = ThinkTags("<|think|>", "<|/think|>", after_open="")
    assert with_think_prefix("r<|/think|>y", tags) == "<|think|>r<|/think|>y"
    assert strip_answer("<|think|>r</think><|/think|>y", tags) == "y"
    assert own_answer("<think>r</think>y", tags) == "<think>r</think>y"
    assert empty_block(None, None, tags) == "<|think|>\n\n<|/think|>\n\n"


@pytest.mark.parametrize(("opening", "closing"), [("", "</think>"), ("<think>", " "), ("<t>", "<t>")])
def test_unusable_tags_are_refused(opening, closing):
    with pytest.raises(UserError, match="two different texts"):
        ThinkTags(opening, closing)


@pytest.mark.parametrize(
    ("prefix", "override", "expected"),
    [
        (None, None, DEFAULT_EMPTY_BLOCK),
        ("", "", DEFAULT_EMPTY_BLOCK),
        ("</think>", None, "</think>"),
        ("<think></think>", None, "<think></think>"),
        ("<think></think>", "<think>\n</think>\n", "<think>\n</think>\n"),
        (None, "<thought>\n</thought>", "<thought>\n</thought>"),
        (None, "<think:opensource></think:opensource>", "<think:opensource></think:opensource>"),
    ],
)
def test_empty_block(prefix, override, expected):
    assert empty_block(prefix, override) == expected


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (r"<think>\n\n</think>\n\n", "a backslash where a line break is meant"),
        ("<think>", "an opening and a closing"),
        ("</think>", "an opening and a closing"),
        ("no thinking", "an opening and a closing"),
        (" ", "an opening and a closing"),
        ("<think></thought>", "an opening and a closing"),
        ("<think></think>Answer:", "an opening and a closing"),
        ("Hm <think></think>", "an opening and a closing"),
        ("</think><think>", "an opening and a closing"),
        ("<think>none</think>", "nothing between its tags, found 'none'"),
        ("<think></think><think></think>", "nothing between its tags"),
        ("<thought>none</thought>", "nothing between its tags, found 'none'"),
    ],
)
def test_override_that_is_no_empty_block(override, told):
    with pytest.raises(UserError, match="^--bvpo_empty_block: ") as caught:
        empty_block("<think></think>", override)
    assert told in str(caught.value)
    # The remedy shows a block that can be used.
    assert "Write" in caught.value.remedy and "think>" in caught.value.remedy
