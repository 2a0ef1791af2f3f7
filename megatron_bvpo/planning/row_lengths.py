"""Tokens of a run's rows, counted without ms-swift: the first rows of a data file, with the model's own tokenizer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.data.rows import STREAMS_KEY, normalise_row
from megatron_bvpo.data.verdicts import RowRules
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.start_checks import read_columns
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.streams import TABLE, sides_of

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
    rules = run.rules
    reading = Reading(rules, read_columns(run.columns or "{}"), auto_mapping=not run.disable_auto_column_mapping)
    found = []
    for _, row in islice(read_rows(file), MOST_ROWS):
        if not isinstance(row, dict):
            continue
        new, verdict = reading.canonical(row)
        if verdict.kept:
            sequences = _sequences(normalise_row(new, verdict, rules), rules)
            lengths = [sum(encode(text) + AROUND for text in texts) for texts in sequences]
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


def _sequences(row: dict[str, Any], rules: RowRules) -> list[list[str]]:
    """The texts of each sequence: prompt messages and a response. `row` is in its normal form."""
    *prompt, response = [str(message["content"]) for message in row["messages"]]
    found = []
    for stream in row[STREAMS_KEY]:
        fields = TABLE[stream].fields[: len(sides_of(stream, unpaired=rules.unpaired))]
        texts = [row.get(name) for name in fields]
        if stream == "trace":
            rejected = row.get("rejected_response")
            if rejected is None:
                rejected = str(row["rejected_messages"][-1]["content"])
            texts = [response, rejected][: len(fields)]
        found += [[*prompt, text] for text in texts]
    return found
