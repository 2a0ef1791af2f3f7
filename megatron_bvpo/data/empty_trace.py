"""Reasoning traces and empty traces in response texts. Pure text in, pure text out.

A response of a thinking model is `<think>` trace `</think>` answer. BVPO needs both readings of it: the
whole text for the trace stream, and the answer alone behind an empty think block for the empty stream.

The rule, made once here (docs/rows.md tells it to users):

- A text **opens** its trace only when it starts with `<think>` (white space aside). The Thinking-2507 models never
  write the opening tag: it stands in their prompt.
- Its **one** `</think>` ends the trace. Of several, no reader can tell the end from a tag that the trace, or the
  answer, speaks of: such an answer is not used (`data/rows.py`). Where a split is needed all the same, the last
  one is taken, as in ms-swift's `Template._remove_thinking_content`.
- A `<think>` behind the end of the trace, or inside a trace that was opened, is text.
- A trace that is opened twice, and a `<think>` after something else, are no response of a model (`unclear_opening`).
- Answers lose their outer white space, again as ms-swift does with answers that it takes out of texts.
"""

import re
from dataclasses import dataclass

from megatron_bvpo.errors import UserError

DEFAULT_EMPTY_BLOCK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class ThinkTags:
    """How a model family spells its think tags.

    Args:
        open: the opening tag.
        close: the closing tag.
        after_open: what the model's generation prompt writes after the opening tag.
    """

    open: str = "<think>"
    close: str = "</think>"
    after_open: str = "\n"

    def __post_init__(self) -> None:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise UserError(
                f"think tags must be two different texts, found {self.open!r} and {self.close!r}",
                remedy="Give an opening and a closing tag, such as <think> and </think>.",
            )


DEFAULT_TAGS = ThinkTags()


@dataclass(frozen=True)
class Trace:
    """A response taken apart: `opened` and `closed` say which tags stood there.

    `trace` and `answer` hold the text between and after the tags as it stood, white space included.
    Without a closing tag, an opened text is all trace, and any other text is all answer.
    """

    trace: str
    answer: str
    opened: bool
    closed: bool

    @property
    def cut_off(self) -> bool:
        """The trace was opened and never ended: the generation limit was reached."""
        return self.opened and not self.closed


def split_trace(text: str, tags: ThinkTags = DEFAULT_TAGS) -> Trace:
    """Takes a response apart at the last closing tag."""
    opened = has_open_think(text, tags)
    body = text.lstrip()[len(tags.open) :] if opened else text
    before, close, after = body.rpartition(tags.close)
    if close:
        return Trace(before, after, opened, True)
    return Trace(body, "", True, False) if opened else Trace("", body, False, False)


def has_open_think(text: str, tags: ThinkTags = DEFAULT_TAGS) -> bool:
    """Whether the text starts with the opening tag, white space aside (closed later or not)."""
    return text.lstrip().startswith(tags.open)


def unclear_opening(text: str, tags: ThinkTags = DEFAULT_TAGS) -> str | None:
    """What is wrong with where the trace opens, in words; None where nothing is.

    `<think><think>` is a prompt's tag and the response's own put together. A text in front of `<think>` may be the
    prompt once more, or a trace that lacks its opening tag and speaks of it.
    """
    opened = has_open_think(text, tags)
    body = text.lstrip()[len(tags.open) :] if opened else text
    if opened:
        return f"{tags.open} twice at the start" if has_open_think(body, tags) else None
    before, close, _ = body.partition(tags.close)
    return f"text in front of {tags.open}" if close and tags.open in before else None


def many_tags(text: str, tags: ThinkTags = DEFAULT_TAGS) -> bool:
    """Whether the text holds an opening or a closing tag more than once."""
    return text.count(tags.open) > 1 or text.count(tags.close) > 1


def strip_answer(text: str, tags: ThinkTags = DEFAULT_TAGS) -> str:
    """The answer without its trace and without outer white space; '' where the trace was cut off."""
    return split_trace(text, tags).answer.strip()


def with_think_prefix(text: str, tags: ThinkTags = DEFAULT_TAGS) -> str:
    """Puts the opening tag in front of a response whose generation prompt held it.

    The prompt of a Thinking-2507 model ends in `<think>\\n`, so what it generates has `</think>` alone, and
    ms-swift does not add the missing part in training. A text that opens its trace loses what white space stands
    in front: ms-swift looks for the tag at the very start, and would put an empty think block before it on that
    side alone. Texts without a trace come back unchanged.
    """
    if has_open_think(text, tags):
        return text.lstrip()
    if tags.close not in text:
        return text
    return tags.open + tags.after_open + text


def own_answer(text: str, tags: ThinkTags = DEFAULT_TAGS) -> str | None:
    """An answer that was generated with thinking off: an empty think block in front is taken away.

    Returns None where the text carries a trace after all.
    """
    parts = split_trace(text, tags)
    if parts.trace.strip() or parts.cut_off:
        return None
    return parts.answer.strip()


def empty_block(template_prefix: str | None, override: str | None = None, tags: ThinkTags = DEFAULT_TAGS) -> str:
    """The text of an empty trace, put between the prompt and the answer.

    Args:
        template_prefix: the template's `non_thinking_prefix`. It is taken as it is: for DeepSeek it is a bare
            `</think>`, because there the prompt holds the opening tag.
        override: the value of `--bvpo_empty_block`. '' counts as not given.
        tags: the model's think tags.

    Returns:
        The override, else the template's own text, else `<think>\\n\\n</think>\\n\\n` in the model's tags.

    Raises:
        UserError: the override is no closed and empty think block.
    """
    if override:
        _check_block(override, tags)
        return override
    if template_prefix:
        return template_prefix
    return f"{tags.open}\n\n{tags.close}\n\n"


# A tag of another family is clear enough when both halves carry one name: <thought> … </thought>.
_SAME_NAME = re.compile(r"\s*<(?P<name>[^<>/\s\\]+)>(?P<inside>.*)</(?P=name)>\s*", re.DOTALL)


def _check_block(block: str, tags: ThinkTags) -> None:
    """Refuses anything but opening tag, white space, closing tag, white space."""
    field, example = "--bvpo_empty_block", DEFAULT_EMPTY_BLOCK
    if "\\n" in block or "\\t" in block:
        raise UserError(
            f"found a backslash where a line break is meant: {block!r}",
            field=field,
            remedy=f"Write ${example!r} in bash, or double quotes in YAML.",
        )
    stripped = block.strip()
    if stripped.startswith(tags.open) and stripped.endswith(tags.close):
        inside = stripped[len(tags.open) : len(stripped) - len(tags.close)]
    elif match := _SAME_NAME.fullmatch(block):
        inside = match["inside"]
    else:
        raise UserError(
            f"expected an opening and a closing think tag with white space between them, found {block!r}",
            field=field,
            remedy=f"Write a closed, empty block such as {example!r}, or leave the flag out.",
        )
    if inside.strip():
        raise UserError(
            f"an empty trace must hold nothing between its tags, found {inside.strip()!r} in {block!r}",
            field=field,
            remedy=f"Write an empty block such as {example!r}, or leave the flag out.",
        )
