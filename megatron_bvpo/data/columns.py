"""Rows whose columns say nothing to us: what stands there, and the `--columns` that would read them."""

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_bvpo.data.rows import is_pair
from megatron_bvpo.data.verdicts import RowProblem

_BETTER = re.compile(r"chosen|accept|prefer|win|good|better|best|positive|pos\b|correct|right|up", re.I)
_WORSE = re.compile(r"reject|los[ei]|bad|worse|worst|negative|neg\b|incorrect|wrong|dispref|down", re.I)
_PROMPT = re.compile(r"prompt|question|query|instruct|input|problem|user|context|task", re.I)
_TALK = re.compile(r"message|conversation|dialog|chat|talk|turn", re.I)


def unknown_form(row: dict[str, Any], reading=None) -> RowProblem:
    """What is said of a row that has neither messages nor a pair of responses.

    Args:
        row: the row.
        reading: if given, a `--columns` is looked for that reads this row.
    """
    remedy = "name the columns with --columns, as from the file's name to messages, query, response, rejected_response"
    for columns in _proposals(row) if reading is not None else ():
        if _reads(row, columns, reading):
            remedy = f"If that is what they mean: --columns '{json.dumps(columns)}'."
            break
    else:
        if reading is not None:
            remedy = f"{remedy[0].upper()}{remedy[1:]}."
    names = ", ".join(list(row)[:12]) or "none"
    more = f" and {len(row) - 12} more" if len(row) > 12 else ""
    return RowProblem("columns", "no messages and no pair of responses", remedy, found=f"{names}{more}")


def _reads(row: dict[str, Any], columns: dict[str, str], reading) -> bool:
    from megatron_bvpo.data.aliases import canonical_row

    given = {**(reading.columns or {}), **columns}
    standard = canonical_row(row, given, reading.auto_mapping, reading.rules.tags)
    return standard is not None and is_pair(standard)


def _proposals(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Guesses by the columns' names, the likeliest first; whoever asks tries them."""
    worse = [name for name in row if _WORSE.search(name)]
    better = [name for name in row if _BETTER.search(name) and name not in worse]
    prompts = [name for name in row if _PROMPT.search(name) and name not in (*worse, *better)]
    talks = [name for name in row if _TALK.search(name) and name not in (*worse, *better)]
    for bad in worse:
        for good in better:
            yield {good: "chosen", bad: "rejected"}
            for prompt in (*prompts, *talks):
                yield {prompt: "query", good: "response", bad: "rejected_response"}
                yield {prompt: "prompt", good: "chosen", bad: "rejected"}
        for talk in talks:
            yield {talk: "messages", bad: "rejected_response"}
            yield {talk: "messages", bad: "rejected_messages"}
