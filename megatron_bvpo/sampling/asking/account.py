"""Which samples are asked for, and which are there."""

from typing import NamedTuple

from megatron_bvpo.sampling.asking.prompts import PromptBook


class Work(NamedTuple):
    """A sample to ask for: the prompt's index, mode and number; for a short one the thinking sample's text."""

    index: int
    mode: str
    number: int
    thinking: str | None = None


class Account:
    """Which samples are there: one bit each.

    Args:
        book: the prompts.
    """

    def __init__(self, book: PromptBook) -> None:
        self.book, self.count, self.good = book, 0, 0
        self._bits: dict[str, list[int]] = {}

    def add(self, prompt_id: str, mode: str, number: int) -> bool:
        """Whether it was not there before."""
        index = self.book.place.get(prompt_id)
        if index is None or self.has(index, mode, number):
            return False
        self._bits.setdefault(mode, [0] * len(self.book))[index] |= 1 << number
        self.count += 1
        return True

    def has(self, index: int, mode: str, number: int) -> bool:
        bits = self._bits.get(mode)
        return bits is not None and bool(bits[index] >> number & 1)
