"""Tokens of a run's rows, counted without ms-swift: the first rows of a data file, with the model's own tokenizer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from megatron_bvpo.data.empty_trace import strip_answer
from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.data.row_shape import has_no_trace_responses
from megatron_bvpo.data.verdicts import RowRules
from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.streams import DEFAULT, TABLE

# A few thousand rows say enough, and take seconds.
MOST_ROWS = 2000
# Tokens around each message that the template adds: <|im_start|>role and <|im_end|> with their line ends.
AROUND = 5


def row_lengths(file: str, model: str, run: RunSettings) -> list[int]:
    """Tokens of each row, all its sequences together; those with a sequence above `max_length` are left out.

    Args:
        file: rows as `swift rlhf` takes them; the first MOST_ROWS are read.
        model: a folder with tokenizer.json.

    Raises:
        UserError: there is no tokenizer.json, the file cannot be read, or no row is of use.
    """
    encode = _encoder(model)
    reading = Reading(RowRules(streams=run.streams))
    found = []
    for _, row in islice(read_rows(file), MOST_ROWS):
        if not isinstance(row, dict):
            continue
        new, verdict = reading.canonical(row)
        if verdict.kept:
            lengths = [sum(encode(text) + AROUND for text in texts) for texts in _sequences(new, run.streams)]
            if lengths and max(lengths) <= (run.max_length or max(lengths)):
                found.append(sum(lengths))
    if not found:
        raise UserError(
            "none of its first rows is of use, or all are longer than max_length",
            file=file,
            field="--rows",
            remedy="start the run: it lists what is wrong with each row before the model is loaded",
        )
    return found


def _encoder(model: str):
    from tokenizers import Tokenizer

    file = Path(model).expanduser() / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            "counting tokens needs the model's tokenizer.json",
            file=str(file),
            field="--rows",
            remedy="name the model's folder: --model FOLDER",
        )
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _sequences(row: dict[str, Any], streams: tuple[str, ...]) -> list[list[str]]:
    """The texts of each sequence: prompt messages and a response."""
    messages = [str(message["content"]) for message in row["messages"]]
    if has_no_trace_responses(row):
        return [[*messages, row[name]] for name in ("empty_response", "empty_rejected_response")]
    prompt, chosen = messages[:-1], messages[-1]
    rejected = row["rejected_response"]
    if rejected is None:
        rejected = str(row["rejected_messages"][-1]["content"])
    found = [
        [*prompt, row[name]]
        for stream in streams
        if stream not in DEFAULT
        for name in TABLE[stream].fields
        if row.get(name)
    ]
    if "trace" in streams:
        found += [[*prompt, chosen], [*prompt, rejected]]
    if "empty" in streams:
        own = (row["empty_response"], row["empty_rejected_response"])
        answers = [own[i] or strip_answer(text) for i, text in enumerate((chosen, rejected))]
        found += [[*prompt, answer] for answer in answers]
    return found
