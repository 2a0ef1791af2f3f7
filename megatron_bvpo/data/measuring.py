"""The pass that encodes every row once: its lengths, and which rows do not fit, with the reason.

ms-swift does the same pass, drops what does not fit, and says no more than two numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, List, Value
from swift.template import MaxLengthError

from megatron_bvpo.data.batches import ROW_KEY
from megatron_bvpo.data.handover import SOURCE_KEY
from megatron_bvpo.data.loading import cells, map_rows
from megatron_bvpo.data.rows import check_row
from megatron_bvpo.errors import UserError

LOST_KEY = "bvpo_lost"
_ROW, _EMPTY = "row", "empty"


@dataclass
class LostRows:
    """Rows, or their empty pairs, that could not be encoded.

    Attributes:
        rows, empty: how many rows, and how many empty pairs alone, by reason.
        listed: the first of them in words.
    """

    rows: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The account for a log; nothing where nothing was lost."""
        lines = []
        for what, counts in (("rows dropped", self.rows), ("rows kept without the empty pair", self.empty)):
            lines += [f"{number} {what}: {reason}" for reason, number in counts.most_common()]
        more = self.rows.total() + self.empty.total() - len(self.listed)
        return lines + self.listed + ([f"… and {more} more."] if more else [])

    def require_rows(self, left: int, files: list[str]) -> None:
        """Raises UserError where no row is left."""
        if not left:
            reasons = "; ".join(f"{number} {reason}" for reason, number in self.rows.most_common(3))
            raise UserError(
                f"no row is left: {reasons}",
                file=", ".join(files) or None,
                field="--max_length",
                remedy="Raise it, or shorten the rows.",
            )


@dataclass(frozen=True)
class MeasureRows:
    """Adds each row's index and sequence lengths, and in the column `bvpo_lost` what was lost of it and why."""

    template: Any

    def batch(self, columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        names = [*columns, ROW_KEY]
        cells = zip(*columns.values(), indices, strict=True)
        rows = [self.preprocess(dict(zip(names, row, strict=True))) for row in cells]
        return {name: [row[name] for row in rows] for name in (*names, "lengths", LOST_KEY)}

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any]:
        row["lengths"], row[LOST_KEY] = [], None
        try:
            encoded = self.template.encode(row, return_length=True)
        except MaxLengthError as error:
            row[LOST_KEY] = [_ROW, f"longer than --max_length {self.template.max_length}", _in_short(error)]
        except Exception as error:  # whatever a template raises for a row, the row is lost and must be counted
            row[LOST_KEY] = [_ROW, f"cannot be encoded ({type(error).__name__})", _in_short(error)]
        else:
            row["lengths"] = encoded["lengths"]
            if check_row(row, self.template.bvpo.rules).empty_ok and "empty_chosen_input_ids" not in encoded:
                reason = f"longer than --max_length {self.template.max_length}"
                row[LOST_KEY] = [_EMPTY, reason, f"its empty pair is {reason}"]
        return row


def measure_dataset(
    dataset, template, *, num_proc: int, load_from_cache_file: bool, max_listed: int = 10
) -> tuple[Any, LostRows]:
    """Returns (the rows that can be encoded, with a column `lengths`; LostRows)."""
    columns = {ROW_KEY: Value("int64"), "lengths": List(Value("int64")), LOST_KEY: List(Value("string"))}
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    measured = map_rows(
        dataset,
        MeasureRows(template).batch,
        Features({**dataset.features, **columns}),
        num_proc=num_proc,
        load_from_cache_file=load_from_cache_file,
    )
    lost = LostRows()
    kept = []
    for i, found in enumerate(cells(measured, LOST_KEY)):
        if found is None or found[0] == _EMPTY:
            kept.append(i)
        if found is None:
            continue
        what, reason, detail = found
        (lost.rows if what == _ROW else lost.empty)[reason] += 1
        if len(lost.listed) < max_listed:
            lost.listed.append(f"{row_in_words(measured[i])}: {detail}")
    return measured.remove_columns(LOST_KEY).select(kept), lost


def row_in_words(row: dict[str, Any], length: int = 60) -> str:
    """Where a row came from, its number, and the start of its prompt: the data are shuffled."""
    asked = [message.get("content") for message in row["messages"] if message.get("role") == "user"]
    text = " ".join(str(asked[-1]).split()) if asked else ""
    shown = text if len(text) <= length else f"{text[:length]}…"
    place = f"{row[SOURCE_KEY]}: " if row.get(SOURCE_KEY) else ""
    return f"{place}row {row.get(ROW_KEY, '?')} ({shown!r})"


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
