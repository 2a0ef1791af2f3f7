"""Prompts that stand in an evaluation set: word n-grams that both share, or, where one is shorter, the whole text.

Words are runs of letters and digits without regard to case; a Chinese or Japanese character is a word of its own,
because these are written without spaces. A prompt with n words or more is dropped for one n-gram of it that stands in
an evaluation text; a shorter one must be equal to one as a whole.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.samples import Prompt

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_ROWS, _TEXT = (".jsonl", ".json", ".csv", ".parquet", ".arrow"), (".txt", ".text", ".md")
# Where the question of an evaluation row stands. Without any of them, every text of the row is one.
_QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "input", "turns", "text", "content")
_TALKS = ("messages", "conversation", "conversations")
# So many prompts for one phrase are its doing, not the evaluation set's.
_MANY = 5


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class Overlap:
    """What stands in evaluation files, to ask prompts about.

    Args:
        files: JSON lines, JSON, CSV, Parquet, Arrow; or text, where each line is one text.
        n: words of an n-gram.

    Raises:
        UserError: a file is missing, of another kind, damaged, or holds no text.

    Attributes:
        texts: how many texts were read.
        found: how often each file and phrase dropped a prompt.
    """

    def __init__(self, files: Sequence[str], n: int = 13):
        self.n = n
        self.texts = 0
        self.found: Counter[str] = Counter()
        self._grams: dict[int, int] = {}
        self._whole: dict[int, int] = {}
        self._files = list(files)
        for number, path in enumerate(self._files):
            before = self.texts
            for text in _texts(path):
                self._add(number, text)
            if self.texts == before:
                raise UserError("no text to compare with", file=path, field="--exclude", remedy="check the file")

    def _add(self, number: int, text: str) -> None:
        found = words(text)
        if not found:
            return
        self.texts += 1
        self._whole.setdefault(hash(tuple(found)), number)
        for gram in self._grams_of(found):
            self._grams.setdefault(hash(gram), number)

    def _grams_of(self, found: list[str]) -> Iterator[tuple[str, ...]]:
        for i in range(len(found) - self.n + 1):
            yield tuple(found[i : i + self.n])

    def reason(self, prompt: Prompt) -> str | None:
        """Where the prompt stands, with the words that say so; None where it does not."""
        said = [m["content"] for m in prompt.messages if m.get("role") == "user" and isinstance(m.get("content"), str)]
        for text in said:
            found = words(text)
            number = self._whole.get(hash(tuple(found))) if found else None
            phrase = found
            if number is None:
                for gram in self._grams_of(found):
                    if (number := self._grams.get(hash(gram))) is not None:
                        phrase = list(gram)
                        break
            if number is not None:
                shown = " ".join(phrase[: self.n])
                self.found[shown] += 1
                return f"stands in {self._files[number]}: {shown!r}"
        return None

    def suspect(self) -> str | None:
        """In words, a phrase that dropped so many prompts that it may be an instruction and no question."""
        if not self.found:
            return None
        phrase, number = self.found.most_common(1)[0]
        if number < _MANY or number * 2 < self.found.total():
            return None
        return (
            f"{number} of the {self.found.total()} dropped prompts share one phrase, {phrase!r}: if that is an "
            "instruction and no question, take it out of the evaluation file or raise --ngram"
        )


def _texts(path: str) -> Iterator[str]:
    ending = os.path.splitext(path)[1]
    if not os.path.isfile(path):
        raise UserError("no such file", file=path, field="--exclude", remedy="check the path")
    if ending in _TEXT:
        try:
            with open(path, encoding="utf-8") as lines:
                yield from lines
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot be read: {error}", file=path, field="--exclude", remedy="save it as UTF-8"
            ) from None
        return
    if ending not in _ROWS:
        known = ", ".join(_ROWS + _TEXT)
        raise UserError(f"expected one of {known}, found {ending or 'no ending'}", file=path, field="--exclude")
    for _, row in read_rows(path):
        if isinstance(row, UserError):
            raise row
        yield from _questions(row)


def _questions(row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield from _strings(row)
        return
    for name in _TALKS:
        talk = row.get(name)
        if isinstance(talk, list):
            for message in talk:
                if isinstance(message, dict) and message.get("role", message.get("from")) in ("user", "human"):
                    yield from _strings(message.get("content", message.get("value")))
            return
    named = {key.lower(): value for key, value in row.items()}
    asked = [named[name] for name in _QUESTIONS if named.get(name)]
    yield from _strings(asked or list(row.values()))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings([value[key] for key in ("content", "text") if key in value] or list(value.values()))
