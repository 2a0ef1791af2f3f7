"""Multiple choice: the letter that a text decides for, and the letter of a row's right answer. Pure text."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bvpo.sampling.judging import final_answers

LETTERS = "ABCDEFGHIJ"
OPTION_COLUMNS = ("options", "choices")

_TEX = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}")
# A letter and no more, or a letter set off from the option's words: B · (B) · **B.** · B) Paris · B: Paris
_MARKED = re.compile(
    r"(?:option|choice)?\s*[(\[{]?\s*(?P<letter>[A-Ja-j])\s*(?:[)\]}]|[.:,](?=\s|$)|$)(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
# After "the answer is": an upper-case letter that no word follows which would make it the words "A" or "I".
_SAID = re.compile(
    r"(?:option|choice)?\s*(?P<letter>[B-HJ]|[AI](?!\s+(?!because|since|as|for|and|or|which|due)[\w]))(?![\w'’])(?P<rest>.*)",
    re.DOTALL,
)
_ANOTHER = re.compile(r"^[)\]}.*\s]*(?:or|and|/|,|&)\s*(?:option\s*)?[(\[]?\s*[A-J]\b(?![\w'’])", re.IGNORECASE)


def options(columns: Mapping[str, Any]) -> list[str]:
    """The texts of a row's options in the order of their letters; [] where the row has none.

    Read are `options` and `choices`: a list of texts, an object of letter → text, ARC's {"label": […], "text": […]},
    and any of these as JSON text. Letters in front of a text ("A. Paris") fall away.
    """
    for name in OPTION_COLUMNS:
        value = columns.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence):
            value = value["text"]
        if isinstance(value, Mapping):
            value = [value[key] for key in sorted(value)]
        if isinstance(value, Sequence) and not isinstance(value, str) and 1 < len(value) <= len(LETTERS):
            return [_without_letter(str(text), LETTERS[at]) for at, text in enumerate(value)]
    return []


def _without_letter(text: str, letter: str) -> str:
    match = re.fullmatch(rf"\(?{letter}[).:]\s*(.+)", text.strip(), re.DOTALL)
    return match[1] if match else text.strip()


def gold_letter(answer: str, texts: Sequence[str]) -> str:
    """The letter of the right answer, which may be a letter or an option's text.

    Raises:
        ValueError: it is neither.
    """
    if (at := _index(answer, texts)) is not None:
        return LETTERS[at]
    if letter := _marked(answer):
        return letter
    have = f" nor one of the {len(texts)} options" if texts else " (and the row has no `options` or `choices`)"
    raise ValueError(f"the right answer {answer[:60]!r} is no letter A to J{have}")


def letter(text: str, texts: Sequence[str] = ()) -> str | None:
    r"""The letter that a text decides for, or None where it decides for none or for several.

    Looked for in this order: \boxed{…}, <answer>…</answer>, "the answer is …" (the last one), a last line that is a
    marked letter, an option's text word for word in one of these places.
    """
    stated = final_answers.stated(text)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    for place in (stated, lines[-1] if lines else None):
        if place is None:
            continue
        if (at := _index(place, texts)) is not None:
            return LETTERS[at]
        if found := _marked(place) or (_said(place) if place is stated else None):
            return found
    return None


def _clean(text: str) -> str:
    text = _TEX.sub(r"\1", text).replace("*", "").replace("$", "").replace("\\(", "(").replace("\\)", ")")
    return " ".join(text.split())  # the patterns would take squares of a long run of spaces


def _marked(text: str) -> str | None:
    match = _MARKED.fullmatch(_clean(text))
    return match["letter"].upper() if match and not _ANOTHER.match(match["rest"]) else None


def _said(text: str) -> str | None:
    match = _SAID.match(_clean(text))
    return match["letter"] if match and not _ANOTHER.match(match["rest"]) else None


def _index(text: str, texts: Sequence[str]) -> int | None:
    """Which option's text this is."""
    wanted = final_answers.normalised(_clean(text), ignore_case=True)
    found = [at for at, option in enumerate(texts) if final_answers.normalised(option, ignore_case=True) == wanted]
    return found[0] if len(found) == 1 else None
