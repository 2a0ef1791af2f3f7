"""What is asked for in each mode, and how a server's reply becomes the text that training wants.

thinking
    Chat, with the template's switch on where it has one. Text: `<think>\\ntrace\\n</think>\\n\\nanswer`.
empty
    Chat with the switch off. Without a switch, or with a block of one's own: a completion of the rendered prompt and
    the empty block. Text: the answer alone.
short
    A completion of the rendered prompt and the first tokens of a thinking sample's trace, closed. Text: like thinking.

Servers do what they like with tags: the trace in a field of its own, the tag of the prompt put in front, no tag at all.
Nothing here trusts them; white space around the tags is written anew, so that the text is the same whatever they do.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_bvpo.data.empty_trace import (
    DEFAULT_EMPTY_BLOCK,
    DEFAULT_TAGS,
    has_open_think,
    many_tags,
    own_answer,
    split_trace,
)
from megatron_bvpo.sampling.asking.chat_templates import ChatTemplate
from megatron_bvpo.sampling.samples import NO_TRACE_END, THINKS, TRUNCATED, Prompt, Sample

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Request(NamedTuple):
    """One request for one answer.

    Attributes:
        prompt_id, mode, number, seed: of the sample that it becomes.
        path: `CHAT` or `COMPLETIONS`.
        body: its JSON object.
        trace: the cut trace in front of a short answer.
        text: a completion's prompt as text, and its tokens where they are known.
    """

    prompt_id: str
    mode: str
    number: int
    seed: int
    path: str
    body: dict[str, Any]
    trace: str = ""
    text: str = ""
    tokens: list[int] = []

    def by_text(self) -> "Request":
        """The completion with its prompt as text."""
        return self._replace(body=self.body | {"prompt": self.text, "add_special_tokens": False})


@dataclass(frozen=True)
class Asking:
    """How samples are asked for: one for a run.

    Args:
        model: the name that the server knows the model by.
        temperature, top_p, max_tokens: of the generation.
        seed: all requests' seeds come from it.
        switch: the variable of the chat template that switches thinking; None: it has none.
        template: the model's chat template; None where only chat requests are made.
        block: the empty trace for completions.
        own_block: the block is the user's: completions, even where the template has a switch.
        short_budget: tokens that a short trace keeps.
        extra: more fields for every request's body.
        as_text: completions carry the prompt's text, not its token ids.
    """

    model: str
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int | None = None
    seed: int = 0
    switch: str | None = None
    template: ChatTemplate | None = None
    block: str = DEFAULT_EMPTY_BLOCK
    own_block: bool = False
    short_budget: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    as_text: bool = False

    @property
    def empty_by(self) -> str:
        """How empty answers are asked for, for people and for settings.json."""
        return f"chat with {self.switch}=false" if self._empty_by_chat else f"completions behind {self.block!r}"

    @property
    def _empty_by_chat(self) -> bool:
        return self.switch is not None and not self.own_block

    def uses(self, modes) -> set[str]:
        """The paths that these modes ask at."""
        paths = {"thinking": CHAT, "empty": CHAT if self._empty_by_chat else COMPLETIONS, "short": COMPLETIONS}
        return {paths[mode] for mode in modes}

    def request(self, prompt: Prompt, mode: str, number: int, thinking: str | None = None) -> Request:
        """The request for one sample; a short one needs the text of the thinking sample of its number."""
        seed = self.seed_of(prompt.prompt_id, mode, number)
        if mode == "thinking" or (mode == "empty" and self._empty_by_chat):
            return Request(prompt.prompt_id, mode, number, seed, CHAT, self._chat(prompt, seed, mode == "thinking"))
        if mode == "empty":
            text, trace = self.empty_prompt(prompt), ""
        else:
            text, trace = self.short_prompt(prompt, thinking)
        # Token ids where there is a tokenizer.json, so that no server adds a BOS.
        tokens = [] if self.as_text or not self.template.has_tokens else _encode(self.template, text)
        extra = {key: value for key, value in self.extra.items() if key != "chat_template_kwargs"}
        body = {"prompt": tokens, "logprobs": 1} | self._common(seed) | extra
        request = Request(prompt.prompt_id, mode, number, seed, COMPLETIONS, body, trace, text, tokens)
        return request if tokens else request.by_text()

    def seed_of(self, prompt_id: str, mode: str, number: int) -> int:
        """The seed of one sample's request."""
        return request_seed(self.seed, prompt_id, mode, number)

    def _chat(self, prompt: Prompt, seed: int, thinking: bool) -> dict[str, Any]:
        body = {"messages": prompt.messages, "logprobs": True} | self._common(seed)
        if self.switch:
            body["chat_template_kwargs"] = {self.switch: thinking}
        if tools := prompt.columns.get("tools"):
            body |= {"tools": tools, "tool_choice": "none"}
        for key, value in self.extra.items():
            both = isinstance(value, dict) and isinstance(body.get(key), dict)
            body[key] = value | body[key] if both else value
        return body

    def _common(self, seed: int) -> dict[str, Any]:
        body = {"model": self.model, "temperature": self.temperature, "top_p": self.top_p, "n": 1, "seed": seed}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body

    def empty_prompt(self, prompt: Prompt) -> str:
        """The rendered prompt and the empty block, as training has them."""
        return self._before_trace(prompt) + self.block

    def short_prompt(self, prompt: Prompt, thinking: str) -> tuple[str, str]:
        """The rendered prompt with a cut and closed trace, and that trace."""
        cut = self.short_trace(thinking)
        return self._before_trace(prompt) + with_trace(cut, ""), cut

    def short_trace(self, thinking: str) -> str:
        """What a short sample keeps of a thinking sample's trace."""
        return self.template.cut(split_trace(thinking).trace.strip(), self.short_budget).rstrip()

    def chat_prompt(self, prompt: Prompt, thinking: bool) -> str:
        """What the model's template makes of a chat request."""
        more = self.extra.get("chat_template_kwargs") or {}
        return self.template.render(prompt.messages, prompt.columns.get("tools"), thinking=thinking, more=more)

    def _before_trace(self, prompt: Prompt) -> str:
        """The rendered prompt up to where a trace opens."""
        text = self.chat_prompt(prompt, thinking=True)
        bare = text.rstrip()
        return bare.removesuffix(DEFAULT_TAGS.open) if bare.endswith(DEFAULT_TAGS.open) else text

    def sample(self, request: Request, choice: dict[str, Any], usage: dict[str, Any] | None) -> Sample:
        """The sample that a reply's choice is."""
        usage = usage if isinstance(usage, dict) else {}
        tokens, logprobs = _logprobs(choice)
        content, reasoning = _fields(choice)
        cut_off = choice.get("finish_reason") == "length"
        opened_itself = tokens[0].strip().startswith(DEFAULT_TAGS.open) if tokens else None
        if request.mode == "thinking":
            opens = self.template is not None and self.template.opens_trace
            text, marks = thinking_text(content, reasoning, opens=opens)
        else:
            text, marks = answer_text(content, reasoning, cut_off=cut_off, opened_itself=opened_itself)
            if request.mode == "short" and THINKS not in marks:
                text = with_trace(request.trace, text)
        generated = usage.get("completion_tokens")
        return Sample(
            prompt_id=request.prompt_id,
            mode=request.mode,
            number=request.number,
            text=_whole_characters(text),
            tokens=generated if isinstance(generated, int) else len(tokens) or None,
            prompt_tokens=usage.get("prompt_tokens") if isinstance(usage.get("prompt_tokens"), int) else None,
            finish_reason="length" if cut_off else "stop",
            logprob_sum=sum(logprobs) if logprobs else None,
            gradient_norm=math.sqrt(sum((1 - math.exp(min(p, 0.0))) ** 2 for p in logprobs)) if logprobs else None,
            seed=request.seed,
            marks=((TRUNCATED,) if cut_off else ()) + marks,
        )


def request_seed(seed: int, prompt_id: str, mode: str, number: int) -> int:
    """31 bits, which every server takes: the same for one sample on every machine and in every run."""
    name = json.dumps([seed, prompt_id, mode, number]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") >> 1


def with_trace(trace: str, answer: str) -> str:
    """Trace and answer as Qwen's and DeepSeek's templates lay them out."""
    return f"{DEFAULT_TAGS.open}\n{trace}\n{DEFAULT_TAGS.close}\n\n{answer}"


def thinking_text(content: str, reasoning: str | None, *, opens: bool = False) -> tuple[str, tuple[str, ...]]:
    """The text of a thinking sample, and what is to be marked.

    Args:
        content: the reply's content, '' for null.
        reasoning: its trace, where the server put one into a field of its own.
        opens: the prompt opens the trace, so that a text without tags is a trace that never ended.
    """
    if reasoning and not has_open_think(content):
        if not content.strip():
            content = reasoning
            opens = True
        elif DEFAULT_TAGS.close not in content:
            return with_trace(_bare(reasoning), content.strip()), ()
        else:  # the parser took the first of several ends for the end
            content = reasoning + DEFAULT_TAGS.close + content
    parts = split_trace(content)
    if parts.closed:
        if many_tags(content):  # nobody can tell where the trace ends: as it came, opened
            return content.strip() if parts.opened else f"{DEFAULT_TAGS.open}\n{content.strip()}", ()
        return with_trace(parts.trace.strip(), parts.answer.strip()), ()
    if parts.opened or opens:
        return f"{DEFAULT_TAGS.open}\n{parts.trace.strip() or parts.answer.strip()}", (NO_TRACE_END,)
    return content.strip(), (NO_TRACE_END,)


def answer_text(
    content: str, reasoning: str | None, *, cut_off: bool, opened_itself: bool | None
) -> tuple[str, tuple[str, ...]]:
    """The text of an answer that was asked for behind a closed trace, and what is to be marked.

    Args:
        content, reasoning: as in `thinking_text`.
        cut_off: the generation limit was reached.
        opened_itself: whether the first generated token opens a trace; None: not known.
    """
    if reasoning is not None and reasoning.strip():
        if content.strip() and _bare(reasoning):
            return with_trace(_bare(reasoning), content.strip()), (THINKS,)
        # A parser that expects a trace takes all of an answer without one for it.
        content = content if content.strip() else reasoning
    if (answer := own_answer(content)) is not None:
        return answer, ()
    parts = split_trace(content)
    if parts.cut_off and not opened_itself and (opened_itself is False or not cut_off):
        return parts.trace.strip(), ()  # the server put the tag there
    if parts.closed:
        return with_trace(parts.trace.strip(), parts.answer.strip()), (THINKS,)
    return f"{DEFAULT_TAGS.open}\n{parts.trace.strip()}", (THINKS,)


def _bare(trace: str) -> str:
    """A trace without the tags that a server left on it."""
    trace = trace.strip().removeprefix(DEFAULT_TAGS.open)
    return trace.removesuffix(DEFAULT_TAGS.close).strip()


def _fields(choice: dict[str, Any]) -> tuple[str, str | None]:
    message = choice.get("message")
    if not isinstance(message, dict):
        return choice.get("text") or "", None
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    reasoning = message.get("reasoning")
    reasoning = message.get("reasoning_content") if reasoning is None else reasoning
    return content or "", reasoning if isinstance(reasoning, str) else None


def _logprobs(choice: dict[str, Any]) -> tuple[list[str], list[float]]:
    """The generated tokens' texts and log-probs; empty where the server tells none."""
    told = choice.get("logprobs")
    if not isinstance(told, dict):
        return [], []
    if isinstance(content := told.get("content"), list):
        pairs = [(item.get("token"), item.get("logprob")) for item in content if isinstance(item, dict)]
    else:
        pairs = list(zip(told.get("tokens") or [], told.get("token_logprobs") or [], strict=False))
    if not pairs or not all(isinstance(p, int | float) and math.isfinite(p) for _, p in pairs):
        return [], []
    return [str(token) for token, _ in pairs], [float(p) for _, p in pairs]


def _whole_characters(text: str) -> str:
    """Half a surrogate pair, which no file can hold, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# The samples of one prompt are asked for together, and all of them have the same tokens.
@lru_cache(maxsize=64)
def _encode(template: ChatTemplate, text: str) -> list[int]:
    return template.encode(text)
