"""Files of prompts → `Prompt`s. What is no prompt is named with file, line and reason, and counted."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_bvpo.data.messages import canonical_messages
from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.samples import Prompt

_ROLES = ("system", "user", "assistant")
_ID_NAMES = ("prompt_id", "id")
# How many bad rows are told one by one.
_SHOWN = 5


class PromptBook(Sequence[Prompt]):
    """Prompts in their order, each as JSON text until it is asked for: a kilobyte a prompt and not four.

    Attributes:
        ids: the prompts' ids; no two are the same.
        place: id → index.
        digest: of ids, messages and answers; another set of prompts has another.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.place: dict[str, int] = {}
        self._rows: list[bytes] = []
        self._hash = hashlib.sha256()

    def add(self, prompt: Prompt) -> None:
        self.place[prompt.prompt_id] = len(self.ids)
        self.ids.append(prompt.prompt_id)
        self._rows.append(json.dumps(prompt, ensure_ascii=False).encode())
        self._hash.update(json.dumps(prompt[:3], ensure_ascii=False).encode() + b"\n")

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(*json.loads(self._rows[index]))


class BadRows:
    """Rows that are no prompts: how many, and the first of them in words."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0
        self.repeated = 0

    def add(self, error: UserError) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(str(error))

    def lines(self) -> list[str]:
        out = []
        if self.count:
            rows = "row is" if self.count == 1 else "rows are"
            out.append(f"{self.count} {rows} left out:")
            out += [f"  {line}" for line in self.first]
            if self.count > len(self.first):
                out.append(f"  and {self.count - len(self.first)} more")
        if self.repeated:
            one = self.repeated == 1
            what = "row repeats a prompt that was read before, and is" if one else "rows repeat prompts, and are"
            out.append(f"{self.repeated} {what} left out")
        return out


def read_prompt_files(paths: Sequence[str], limit: int | None = None) -> tuple[PromptBook, BadRows]:
    """The prompts of several files, in order; reading ends at `limit` prompts.

    Raises:
        UserError: a file cannot be read, or no row of all of them is a prompt.
    """
    book, bad = PromptBook(), BadRows()
    columns: Counter[str] = Counter()
    for source, row in _rows(paths):
        if limit is not None and len(book) >= limit:
            break
        try:
            if isinstance(row, UserError):
                raise row
            if isinstance(row, dict):
                columns.update(map(str, row))
            _put(book, bad, _prompt(row, source))
        except UserError as error:
            bad.add(error)
    if not book:
        found = f"; columns found: {', '.join(sorted(columns)[:12])}" if columns else ""
        raise UserError(
            f"no row is a prompt{found}; first: {bad.first[0] if bad.first else 'no rows'}",
            field="PROMPTS",
            remedy="give rows with `messages` that end in a user turn, or with `prompt`",
        )
    return book, bad


def _rows(paths: Sequence[str]) -> Iterator[tuple[tuple[str, int], Any]]:
    for path in paths:
        for line, row in read_rows(path):
            yield (path, line), row


def _put(book: PromptBook, bad: BadRows, prompt: Prompt) -> None:
    if prompt.prompt_id not in book.place:
        book.add(prompt)
        return
    known = book[book.place[prompt.prompt_id]]
    if (known.messages, known.answer) == (prompt.messages, prompt.answer):
        bad.repeated += 1
        return
    other = "prompt" if known.messages != prompt.messages else "answer"
    path, _, line = prompt.source.rpartition(":")
    raise UserError(
        f"{prompt.prompt_id!r} stands at {known.source} with another {other}",
        file=path,
        line=int(line),
        remedy="give each prompt an id and an answer of its own",
    )


def _prompt(row: Any, source: tuple[str, int]) -> Prompt:
    def bad(problem: str, remedy: str, field: str | None = None) -> UserError:
        return UserError(problem, file=source[0], line=source[1], field=field, remedy=remedy)

    if not isinstance(row, dict):
        raise bad(f"expected an object, found {type(row).__name__}", "write one JSON object a line")
    name = next((name for name in ("messages", "prompt") if row.get(name) is not None), None)
    if name is None:
        raise bad("no prompt", "give `messages` or `prompt`")
    given = row[name]
    if isinstance(given, str) and name == "prompt":
        given = [{"role": "user", "content": given}]
    messages = canonical_messages(given, row.get("system"))
    if problem := _messages_problem(messages):
        raise bad(problem, "a prompt is messages with texts that end in a user turn, or one text", name)
    rest = {key: value for key, value in row.items() if key not in (name, "answer", "system", *_ID_NAMES)}
    return Prompt(
        prompt_id=_prompt_id(row, messages, rest.get("tools"), bad),
        messages=messages,
        answer=_text(row.get("answer")),
        source=f"{source[0]}:{source[1]}",
        columns=json.loads(json.dumps(rest, default=str)),
    )


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"expected a list of messages, found {'nothing' if not messages else type(messages).__name__}"
    for message in messages:
        if not isinstance(message, dict):
            return f"expected messages, found {type(message).__name__}"
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return f"a turn of the role {role!r} cannot be asked (known: {', '.join(_ROLES)})"
        if not isinstance(content, str):
            return f"the content of a {role} turn is no text"
    if messages[-1]["role"] != "user":
        return f"ends in a turn of the role {messages[-1]['role']!r}, expected 'user'"
    if not messages[-1]["content"].strip():
        return "the last user turn is empty"
    return None


def _prompt_id(row: dict, messages: list, tools: Any, bad) -> str:
    for name in _ID_NAMES:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise bad(f"expected a text or a whole number, found {value!r}", "give each prompt an id", name)
        return str(value)
    what = [messages, tools] if tools else messages
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]


def _text(value: Any) -> str | None:
    """The answer as text: numbers as they are written, lists and objects as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
