"""Judges that compare texts: `exact` and `choice`. They run in this process; nothing in them can take long."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_bvpo.sampling.judging import choices, final_answers
from megatron_bvpo.sampling.judging.judge_items import NO_GOLD, Item, Streaming, without_judge
from megatron_bvpo.sampling.samples import Judgement

# What a comparison says: right or not, and the answer that was read. ValueError: the row cannot be judged.
Compare = Callable[[Item], tuple[bool, str | None]]


class TextJudge(Streaming):
    """A judge made of a comparison."""

    needs_answers = True

    def __init__(self, name: str, compare: Compare, settings: dict[str, Any]) -> None:
        self.name, self.compare, self.settings = name, compare, settings

    def stream(self, items: Iterable[Item]) -> Iterator[Judgement]:
        for item in items:
            yield self._one(item)

    def _one(self, item: Item) -> Judgement:
        if said := without_judge(item):
            return said
        if item.answer is None:
            return Judgement(*item.key, error=NO_GOLD)
        try:
            right, parsed = self.compare(item)
        except ValueError as error:
            return Judgement(*item.key, error=str(error))
        return Judgement(*item.key, score=float(right), right=right, parsed=parsed)


def exact(ignore_case: bool = False) -> TextJudge:
    """The final answer is the right one's text, up to `final_answers.normalised`. So is a whole text that equals it."""

    def compare(item: Item) -> tuple[bool, str | None]:
        wanted = final_answers.normalised(final_answers.gold(item.answer), ignore_case)
        parsed = final_answers.final(item.text)
        for candidate in final_answers.readings(parsed) if parsed is not None else ():
            if final_answers.normalised(candidate, ignore_case) == wanted:
                return True, candidate
        whole = item.text.strip()
        if final_answers.normalised(whole, ignore_case) in (
            wanted,
            final_answers.normalised(item.answer, ignore_case),
        ):
            return True, whole
        return False, parsed

    return TextJudge("exact", compare, {"judge": "exact", "ignore_case": ignore_case})


def choice() -> TextJudge:
    """The letter of a multiple choice is the right one."""

    def compare(item: Item) -> tuple[bool, str | None]:
        options = choices.options(item.columns)
        wanted = choices.gold_letter(item.answer, options)
        letter = choices.letter(item.text, options)
        return letter == wanted, letter

    return TextJudge("choice", compare, {"judge": "choice"})
