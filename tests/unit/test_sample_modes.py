"""Whatever a server does with tags, a sample's text is what training wants."""

import math

import pytest

from megatron_bvpo.sampling.asking.modes import CHAT, Asking, answer_text, request_seed, thinking_text
from megatron_bvpo.sampling.samples import NO_TRACE_END, THINKS, TRUNCATED, Prompt

WHOLE = "<think>\nr\n</think>\n\ny"
PROMPT = Prompt("p", [{"role": "user", "content": "Hi"}], None, "f:1", {})


@pytest.mark.parametrize(
    ("content", "reasoning", "opens", "text", "marks"),
    [
        (WHOLE, None, False, WHOLE, ()),
        ("r\n</think>\n\ny", None, False, WHOLE, ()),  # the tag stood in the prompt
        ("<think>r</think>y\n", None, False, WHOLE, ()),
        ("y", "r", False, WHOLE, ()),
        ("\n\ny", "\nr\n", False, WHOLE, ()),
        ("y", "<think>\nr\n</think>", False, WHOLE, ()),  # tags left on the field
        (WHOLE, "r", False, WHOLE, ()),  # told twice
        ("", WHOLE, False, WHOLE, ()),
        ("<think>\n\n</think>\n\ny", None, False, "<think>\n\n</think>\n\ny", ()),
        # A trace that never ended: in whatever field, with or without its tag.
        ("", "r", False, "<think>\nr", (NO_TRACE_END,)),
        ("<think>\nr", None, False, "<think>\nr", (NO_TRACE_END,)),
        ("r", None, True, "<think>\nr", (NO_TRACE_END,)),
        # No trace at all, or one that nobody can see.
        ("y", None, False, "y", (NO_TRACE_END,)),
        ("y", "", False, "y", (NO_TRACE_END,)),
        # Several ends: nobody can tell which; as it came.
        ("r </think> s </think> y", None, False, "<think>\nr </think> s </think> y", ()),
        ("s </think> y", "r", False, "<think>\nr</think>s </think> y", ()),
    ],
)
def test_thinking(content, reasoning, opens, text, marks):
    assert thinking_text(content, reasoning, opens=opens) == (text, marks)


@pytest.mark.parametrize(
    ("content", "reasoning", "cut_off", "opened_itself", "text", "marks"),
    [
        ("y", None, False, None, "y", ()),
        ("<think>\n\n</think>\n\ny", None, False, None, "y", ()),
        ("\n</think>\n\ny", None, False, None, "y", ()),
        ("", "y", False, None, "y", ()),  # vLLM's deepseek_r1 parser
        ("", "y", True, None, "y", ()),
        ("<think>\ny", None, False, None, "y", ()),  # swift deploy
        ("<think>\ny", None, True, False, "y", ()),  # the first token tells that the server put the tag there
        ("y", "", False, None, "y", ()),
        ("y", "\n", False, None, "y", ()),
        ("", None, False, None, "", ()),
        # It thinks all the same.
        (WHOLE, None, False, None, WHOLE, (THINKS,)),
        ("r\n</think>\n\ny", None, False, None, WHOLE, (THINKS,)),
        ("y", "r", False, None, WHOLE, (THINKS,)),
        ("<think>\nr", None, True, None, "<think>\nr", (THINKS,)),
        ("<think>\nr", None, False, True, "<think>\nr", (THINKS,)),
    ],
)
def test_answer_behind_a_closed_trace(content, reasoning, cut_off, opened_itself, text, marks):
    assert answer_text(content, reasoning, cut_off=cut_off, opened_itself=opened_itself) == (text, marks)


def sample(asking, mode, choice, usage=None):
    return asking.sample(asking.request(PROMPT, mode, 3), choice, usage)


def test_what_a_sample_keeps_of_a_reply():
    asking = Asking("m", switch="enable_thinking", max_tokens=5)
    told = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]}
    found = sample(
        asking,
        "thinking",
        {"message": {"content": "<think>\nr"}, "finish_reason": "length", "logprobs": told},
        {"prompt_tokens": 7, "completion_tokens": 2},
    )
    assert (found.tokens, found.prompt_tokens, found.finish_reason) == (2, 7, "length")
    assert found.marks == (TRUNCATED, NO_TRACE_END)
    assert found.logprob_sum == -1.5
    assert found.gradient_norm == pytest.approx(math.hypot(1 - math.exp(-0.5), 1 - math.exp(-1.0)))


@pytest.mark.parametrize("told", [None, {}, {"content": None}, {"content": [{"token": "a", "logprob": None}]}, "no"])
def test_no_logprobs_are_none(told):
    found = sample(Asking("m", switch="x"), "empty", {"message": {"content": "y"}, "logprobs": told})
    assert (found.logprob_sum, found.gradient_norm, found.tokens, found.text) == (None, None, None, "y")


def test_half_a_character_can_be_written():
    found = sample(Asking("m", switch="x"), "empty", {"message": {"content": "a\ud800b😀"}})
    assert found.text == "a\ufffdb😀"
    found.to_json().encode()


def test_a_request_is_what_was_given_and_its_seed_is_its_own():
    asking = Asking("m", 0.7, 0.9, 50, seed=3, switch="thinking", extra={"top_k": 20, "chat_template_kwargs": {"a": 1}})
    thinking, empty = asking.request(PROMPT, "thinking", 0), asking.request(PROMPT, "empty", 0)
    assert thinking.path == empty.path == CHAT
    common = {"model": "m", "temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "n": 1, "top_k": 20, "logprobs": True}
    for request, switch in ((thinking, True), (empty, False)):
        own = {"messages": PROMPT.messages, "seed": request.seed, "chat_template_kwargs": {"a": 1, "thinking": switch}}
        assert request.body == common | own
    seeds = {request_seed(s, p, m, n) for s in (0, 1) for p in "ab" for m in ("thinking", "empty") for n in range(8)}
    assert len(seeds) == 64 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(0, "p", "empty", 1) == request_seed(0, "p", "empty", 1) == 786732190


def test_tools_are_asked_with():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = Asking("m").request(PROMPT._replace(columns={"tools": [tool]}), "thinking", 0).body
    assert body["tools"] == [tool] and body["tool_choice"] == "none"
