"""Samples handed out by a budget, in rounds that outlive a kill.

    DIR/rounds/000001.json    {"thinking": {prompt_id: [first number, count], …}, "empty": {…}}

A round is written before it is asked for. Started again, the run asks for what is missing of the rounds that are there,
and plans the next one only when all of them are judged: a run that was killed asks for what an undisturbed one does.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.account import Account, Work
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.samples import Judgement, writing

ROUNDS = "rounds"
_STEPS = 10**6


class PlannedRound(NamedTuple):
    """A new round: its number, how many samples it asks for, and lines that say so."""

    number: int
    samples: int
    line: str


class Rounds:
    """The rounds of a folder.

    Args:
        folder: the folder of samples.
        book: the prompts.
        modes: modes that the budget is for (a short sample follows its thinking sample).
        plan: `budgets.plan` with its settings bound: tallies → how many more samples each prompt gets.
        tally: makes `budgets.Tally` of asked, right, wrong and the gradient norm.
        describe: lines on what the budgets would come to, given tallies.

    Raises:
        UserError: a round's file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        book: PromptBook,
        modes: tuple[str, ...],
        plan: Callable[[Mapping[str, Any]], dict[str, int]],
        tally: Callable[[int, int, int, float | None], Any],
        describe: Callable[[Mapping[str, Any]], list[str]] = lambda tallies: [],
    ) -> None:
        self.folder, self.book, self.modes = folder / ROUNDS, book, modes
        self.plan, self.tally, self.describe = plan, tally, describe
        self._asked = {mode: [0] * len(book) for mode in modes}
        self._right = {mode: [0] * len(book) for mode in modes}
        self._wrong = {mode: [0] * len(book) for mode in modes}
        self._norms = {mode: ([0] * len(book), [0] * len(book)) for mode in modes}
        self._rounds: list[dict[str, dict[str, list[int]]]] = []
        for path in sorted(self.folder.glob("*.json")):
            self._take(_read(path))

    @property
    def spent(self) -> int:
        """Samples of all rounds."""
        return sum(map(sum, self._asked.values()))

    def arrived(self, prompt_id: str, mode: str, gradient_norm: float | None) -> None:
        """An answer arrived."""
        if mode in self._norms and gradient_norm is not None and prompt_id in self.book.place:
            sums, counts = self._norms[mode]
            index = self.book.place[prompt_id]
            sums[index] += round(gradient_norm * _STEPS)  # whole numbers: their sum knows no order
            counts[index] += 1

    def judged(self, judgement: Judgement) -> None:
        """An answer was judged."""
        if judgement.mode in self._asked and judgement.right is not None and judgement.prompt_id in self.book.place:
            side = self._right if judgement.right else self._wrong
            side[judgement.mode][self.book.place[judgement.prompt_id]] += 1

    def unfinished(self, account: Account) -> Iterator[Work]:
        """What is missing of the rounds that were planned."""
        for planned in self._rounds:
            for prompt_id in self.book.ids:
                for mode in self.modes:
                    first, count = planned.get(mode, {}).get(prompt_id, (0, 0))
                    index = self.book.place[prompt_id]
                    for number in range(first, first + count):
                        if not account.has(index, mode, number):
                            yield Work(index, mode, number)

    def tallies(self, mode: str) -> dict[str, Any]:
        """What is known of each prompt in one mode."""
        sums, counts = self._norms[mode]
        return {
            prompt_id: self.tally(
                self._asked[mode][index],
                self._right[mode][index],
                self._wrong[mode][index],
                sums[index] / counts[index] / _STEPS if counts[index] else None,
            )
            for index, prompt_id in enumerate(self.book.ids)
        }

    def next_round(self) -> PlannedRound | None:
        """Plans and writes the next round; None where nothing is left to ask for."""
        planned, lines = {}, []
        for mode in self.modes:
            if len(self._rounds) == 1:  # the pilot is judged: what is ahead can be told
                lines += [f"{mode}: {line}" for line in self.describe(self.tallies(mode))]
            more = {prompt_id: count for prompt_id, count in self.plan(self.tallies(mode)).items() if count > 0}
            if more:
                asked = self._asked[mode]
                planned[mode] = {i: [asked[self.book.place[i]], count] for i, count in more.items()}
        if not planned:
            return None
        number = len(self._rounds) + 1
        path = self.folder / f"{number:06d}.json"
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with writing(path):
            self.folder.mkdir(exist_ok=True)
            aside.write_text(json.dumps(planned, ensure_ascii=False), "utf-8")
            os.replace(aside, path)
        self._take(planned)
        samples = sum(count for mode in planned.values() for _, count in mode.values())
        prompts = len({prompt_id for mode in planned.values() for prompt_id in mode})
        most = max(count for mode in planned.values() for _, count in mode.values())
        lines.append(f"round {number}: {samples:,} samples for {prompts:,} prompts, at most {most} for one")
        return PlannedRound(number, samples, "\n".join(lines))

    def _take(self, planned: dict[str, dict[str, list[int]]]) -> None:
        self._rounds.append(planned)
        for mode, prompts in planned.items():
            for prompt_id, (first, count) in prompts.items():
                index = self.book.place.get(prompt_id)
                if index is not None and mode in self._asked:
                    self._asked[mode][index] = max(self._asked[mode][index], first + count)


def _read(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        found = json.loads(path.read_text("utf-8"))
        for prompts in found.values():
            for first, count in prompts.values():
                if not math.isfinite(first + count):
                    raise ValueError("a number is not finite")
        return found
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"cannot be read: {error}", file=str(path), remedy="restore it, or sample into a new folder"
        ) from None
