"""Judges that run in a pool of processes with a time limit: `math`, and a function of the user's."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_bvpo.sampling.judging import final_answers
from megatron_bvpo.sampling.judging.judge_items import NO_GOLD, Item, Streaming, without_judge
from megatron_bvpo.sampling.judging.judge_pool import JudgePool, Outcome
from megatron_bvpo.sampling.samples import Judgement

# From the pool's answer for an item to its judgement.
Reading = Callable[[Item, Any], Judgement]


class PoolJudge(Streaming):
    """A judge whose verdicts are made in processes.

    Args:
        name, settings, needs_answers: as in `Judge`.
        pool: where verdicts are made.
        payload: what a process is given of an item.
        read: what its answer means.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        needs_answers: bool,
        pool: JudgePool,
        payload: Callable[[Item], Any],
        read: Reading,
    ) -> None:
        self.name, self.settings, self.needs_answers = name, settings, needs_answers
        self._pool, self._payload, self._read = pool, payload, read

    def close(self) -> None:
        self._pool.close()

    def stream(self, items: Iterable[Item]) -> Iterator[Judgement]:
        said: list[Judgement] = []
        for item, outcome in self._pool.run(self._jobs(items, said)):
            yield from _drained(said)
            yield self._judgement(item, outcome)
        yield from _drained(said)

    def _jobs(self, items: Iterable[Item], said: list[Judgement]) -> Iterator[tuple["_ByKey", Any]]:
        for item in items:
            ahead = without_judge(item)
            if ahead is None and item.answer is None and self.needs_answers:
                ahead = Judgement(*item.key, error=NO_GOLD)
            if ahead is not None:
                said.append(ahead)
            else:
                yield _ByKey(item), self._payload(item)

    def _judgement(self, job: "_ByKey", outcome: Outcome) -> Judgement:
        item = job.item
        if outcome.error is not None:
            return Judgement(*item.key, error=outcome.error, seconds=outcome.seconds)
        return self._read(item, outcome.value)._replace(seconds=outcome.seconds)


class _ByKey:
    """An item as a key of the pool's: items hold lists and cannot be hashed."""

    def __init__(self, item: Item) -> None:
        self.item = item


def _drained(said: list[Judgement]) -> Iterator[Judgement]:
    while said:
        yield said.pop(0)


def function_judge(spec: str, workers: int, time_limit: float, threshold: float | None) -> PoolJudge:
    """`package.module:function`; a score is right from `threshold` on (1 where none is given).

    Raises:
        UserError: no such function, or one whose signature cannot be served.
    """
    bound = 1.0 if threshold is None else threshold

    def payload(item: Item) -> dict[str, Any]:
        final = final_answers.stated(item.text)
        return {
            "text": item.text,
            "final": item.text.strip() if final is None else final,
            "answer": item.answer,
            "messages": item.messages,
            "columns": item.columns,
            "question": item.question,
            "prompt_id": item.key.prompt_id,
            "mode": item.key.mode,
        }

    def read(item: Item, told: dict[str, Any]) -> Judgement:
        right = told["right"] if told["right"] is not None else told["score"] >= bound
        score = told["score"] if told["score"] is not None else float(right)
        # A function that does not say what it parsed has read the text as a whole.
        parsed = told["parsed"] if told.get("parsed_told") else item.text.strip()
        return Judgement(*item.key, score=score, right=right, parsed=parsed)

    pool = JudgePool("megatron_bvpo.sampling.judging.function_calls:judge", {"function": spec}, workers, time_limit)
    settings = {"judge": spec, "threshold": bound, "source": _source_digest(spec)}
    return PoolJudge(spec.rpartition(":")[2].rpartition(".")[2], settings, False, pool, payload, read)


def _source_digest(spec: str) -> str | None:
    """Which version of the function's file it was; None where its source is no file."""
    try:
        found = importlib.util.find_spec(spec.partition(":")[0])
    except (ImportError, ValueError):
        return None
    if found is None or not found.origin or not found.origin.endswith(".py"):
        return None
    with open(found.origin, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:12]
