"""What a judge is given, what it must be able to do, and what is said of answers that no judge need see."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_bvpo.data.empty_trace import strip_answer
from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.samples import Judgement, Prompt, Sample, SampleKey

FAILED_REQUEST = "no text: the request failed"
NO_FINAL_ANSWER = "no final answer: the text ends in its trace, or is empty"
NO_GOLD = "the prompt has no answer to compare with"


class Item(NamedTuple):
    """One answer to judge.

    Attributes:
        key: the sample's name.
        messages: the conversation that was asked, which ends in a user turn.
        answer: the right final answer, where the prompt has one.
        text: what is judged: the answer behind the trace ('' where the trace never ended), or the whole response.
            None: the request failed, and there is nothing to judge.
        columns: the prompt's other columns.
    """

    key: SampleKey
    messages: list[dict[str, Any]]
    answer: str | None
    text: str | None
    columns: dict[str, Any]

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return message_text(self.messages[-1]) if self.messages else ""


class Judge(Protocol):
    """Says of answers whether they are right, or how good they are. One thread at a time may use it.

    Attributes:
        name: the default name of its folder.
        settings: what its verdicts depend on, as JSON values; judgements of other settings are not mixed with its own.
        needs_answers: whether it can say nothing of a prompt without a right answer.
    """

    name: str
    settings: dict[str, Any]
    needs_answers: bool

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item, in the items' order; no two items have one key.

        What goes wrong with an item stands in its judgement.
        """

    def stream(self, items: Iterable[Item]) -> Iterator[Judgement]:
        """The same in the order in which judgements are made; items are taken as they are needed."""

    def close(self) -> None:
        """End the processes behind it."""


@dataclass(frozen=True)
class JudgeOptions:
    """What a judge may be told beside its specification; each kind reads what concerns it.

    Attributes:
        workers: processes of `math` and of functions; 0 for the machine's cores.
        time_limit: seconds for one item; 0 for the kind's own (10 in a process, 120 for a reward, 600 for a judge
            model).
        model: the served model's name; '' for the first that the server names.
        rubric: `llm`'s rubric; None for the built-in one.
        threshold: from which score on an answer is right.
        concurrency: requests in flight.
        label: which of a classifier's numbers is the score, counted from 0.
        tokenizer: folder of the reward model's tokenizer, for servers that want the rendered conversation (SGLang).
        max_tokens: `llm`'s limit.
        ignore_case: `exact` compares without case.
    """

    workers: int = 0
    time_limit: float = 0.0
    model: str = ""
    rubric: Path | None = None
    threshold: float | None = None
    concurrency: int = 64
    label: int | None = None
    tokenizer: Path | None = None
    max_tokens: int = 4096
    ignore_case: bool = False

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("time_limit", 0), ("concurrency", 1), ("max_tokens", 1)):
            if not getattr(self, name) >= least:  # a NaN, too
                raise UserError(f"must be {least} or more, found {getattr(self, name)}", field=f"--{name}")
        for name in ("time_limit", "threshold"):
            if not math.isfinite(getattr(self, name) or 0):
                raise UserError(f"must be a finite number, found {getattr(self, name)}", field=f"--{name}")

    @property
    def processes(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    def limit(self, default: float) -> float:
        return self.time_limit or default


class Streaming:
    """`judge` made from `stream`."""

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        made = {judgement.key: judgement for judgement in self.stream(items)}
        return [made[item.key] for item in items]

    def close(self) -> None:
        pass


def item(prompt: Prompt, sample: Sample, whole: bool = False) -> Item:
    """What a judge sees of a sample.

    Args:
        prompt: the sample's prompt.
        sample: the answer.
        whole: the whole response, its trace too, instead of its final answer.
    """
    return item_of(prompt, sample.key, judged_text(sample.text, whole))


def item_of(prompt: Prompt, key: SampleKey, text: str | None) -> Item:
    """The item of a sample whose `judged_text` is known."""
    return Item(key, prompt.messages, prompt.answer, text, prompt.columns)


def judged_text(text: str | None, whole: bool = False) -> str | None:
    """What is judged of a response."""
    return text if text is None or whole else strip_answer(text)


def message_text(message: dict[str, Any]) -> str:
    """A message's text, whichever of the two usual forms its content has."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def without_judge(item: Item, verdicts: bool = True) -> Judgement | None:
    """The judgement of an item that has nothing to judge; None where a judge must look.

    A response without a final answer is a wrong one, and nothing was parsed; a judge that knows scores alone
    (`verdicts` false) has none for it. A request that failed says nothing about the model.
    """
    if item.text is None:
        return Judgement(*item.key, error=FAILED_REQUEST)
    if not item.text.strip():
        wrong = {"score": 0.0, "right": False} if verdicts else {}
        return Judgement(*item.key, **wrong, error=NO_FINAL_ANSWER)
    return None
