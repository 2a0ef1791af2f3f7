"""`reward:URL`: the score of a reward model behind a server.

| route | server | asked with | score |
|---|---|---|---|
| `/classify` (default) | vLLM | `messages`, the response as the last of them | `data[0].probs`, without activation |
| `/classify` | SGLang | `input_ids` or `text`: the rendered conversation (`--tokenizer`) | `[0].embedding` |
| `/v1/classify` | SGLang | `input`: its text | `data[0].probs` |
| `/pooling` | vLLM | `messages` | `data[0].data`, its last token's number |
| `/score`, `/v1/score` | vLLM | `text_1`: the question, `text_2`: the response | `data[0].score` |

With `--tokenizer`, vLLM's routes get the rendered text as `input`, too (releases whose routes know no `messages`).
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging.judge_items import Item, JudgeOptions, Streaming, without_judge
from megatron_bvpo.sampling.judging.judge_requests import AskFailed, JudgeServer, served_model, split_address
from megatron_bvpo.sampling.samples import Judgement

ROUTES = ("/classify", "/v1/classify", "/pooling", "/score", "/v1/score")
PAIRS = ("/score", "/v1/score")
TIME_LIMIT_S = 120.0


class RewardJudge(Streaming):
    """Scores of a served reward model; right or wrong only from a threshold on.

    Args:
        url: the server's address, with or without one of `ROUTES`.
        options: model, label, threshold, tokenizer, concurrency, time_limit.

    Raises:
        UserError: nobody answers there, or the server wants a rendered text and no tokenizer is named.
    """

    name = "reward"
    needs_answers = False

    def __init__(self, url: str, options: JudgeOptions) -> None:
        base, route = split_address(url, ROUTES)
        self.route = route or "/classify"
        self._server = JudgeServer(base, options.concurrency, options.limit(TIME_LIMIT_S))
        self._model, self._engine = served_model(self._server, options.model)
        self._label, self._threshold = options.label, options.threshold
        self._template = None
        if options.tokenizer is not None:
            from megatron_bvpo.sampling.asking.chat_templates import ChatTemplate

            self._template = ChatTemplate(options.tokenizer)
        elif self._engine == "sglang" and self.route not in PAIRS or self.route == "/v1/classify":
            raise UserError(
                f"{base}{self.route} takes rendered text, and the model's chat template is not known",
                field="--tokenizer",
                remedy="name the folder of the reward model's tokenizer",
            )
        self.settings: dict[str, Any] = {
            "judge": "reward",
            "route": self.route,
            "model": self._model,
            "label": self._label,
            "threshold": self._threshold,
        }

    def stream(self, items: Iterable[Item]) -> Iterator[Judgement]:
        return self._server.run(items, self._one)

    async def _one(self, item: Item) -> Judgement:
        if said := without_judge(item, verdicts=self._threshold is not None):
            return said
        began = time.monotonic()
        try:
            numbers = _numbers(await self._server.post(self.route, self._body(item)))
            if len(numbers) == 1 and not self._label:
                score = numbers[0]
            elif self._label is not None and self._label < len(numbers):
                score = numbers[self._label]
            else:
                raise UserError(
                    f"{self.route} gives {len(numbers)} numbers for a response",
                    field="--label",
                    remedy=f"say which is the score, 0 to {len(numbers) - 1}",
                )
        except AskFailed as error:
            return Judgement(*item.key, error=str(error), seconds=time.monotonic() - began)
        right = None if self._threshold is None else score >= self._threshold
        return Judgement(
            *item.key, score=score, right=right, parsed=item.text.strip(), seconds=time.monotonic() - began
        )

    def _body(self, item: Item) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model} if self._model else {}
        if self._label is None:
            body["use_activation"] = False  # the raw score: a sigmoid of it saturates; SGLang ignores the key
        if self.route in PAIRS:
            return {**body, "text_1": item.question, "text_2": item.text}
        messages = [*item.messages, {"role": "assistant", "content": item.text}]
        if self._template is None:
            return {**body, "messages": messages}
        text = self._template.conversation(messages)
        if self._engine == "sglang" and self.route == "/classify":
            # Token ids where they can be had: SGLang would put another BOS in front of a text that has one.
            return {"input_ids": self._template.encode(text)} if self._template.has_tokens else {"text": text}
        return {**body, "input": text, "add_special_tokens": False}


def _numbers(reply: Any) -> list[float]:
    """The numbers that a reply has for the one text that was sent.

    Raises:
        AskFailed: the reply has another form, or a number is none.
    """
    try:
        entry = reply[0] if isinstance(reply, list) else reply["data"][0] if "data" in reply else reply
        found = next(entry[name] for name in ("score", "probs", "data", "embedding") if name in entry)
        if isinstance(found, list) and found and isinstance(found[0], list):
            found = found[-1]  # one row a token: a response's score stands at its last
        numbers = [float(number) for number in (found if isinstance(found, list) else [found])]
    except (KeyError, IndexError, TypeError, ValueError, StopIteration):
        raise AskFailed(f"a reply without a score: {str(reply)[:200]}") from None
    if not numbers or any(number != number for number in numbers):
        raise AskFailed(f"a reply without a score: {str(reply)[:200]}")
    return numbers
