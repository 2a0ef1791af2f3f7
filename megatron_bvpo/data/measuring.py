"""The pass that encodes every row once: its lengths, and which pairs cannot be trained or were cut, with the reason.

ms-swift does the same pass, drops what does not fit, and says no more than two numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, List, Value

from megatron_bvpo.data.batches import ROW_KEY, row_in_words
from megatron_bvpo.data.loading import cells
from megatron_bvpo.data.mapping import made_by, map_rows
from megatron_bvpo.data.pair_checks import Account, Loss
from megatron_bvpo.data.verdicts import member_of
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import ORDER, TABLE

ACCOUNT_COLUMN = "bvpo_account"
# Raise it when rows are encoded or judged in another way: the pass may be read from a cache on disk.
_VERSION = 2


def _by_stream() -> dict[str, Counter[str]]:
    return {stream: Counter() for stream in ORDER}


@dataclass
class MeasuredRows:
    """What encoding found in the rows of a dataset: every pair that was judged usable is in `pairs` or in `lost`.

    Attributes:
        pairs, cut: pairs that are left, and those of them that were cut to `--max_length`, by stream.
        lost: pairs that are not, by stream and reason.
        alone: those of them whose row keeps its other pair.
        rows: rows that lost all their pairs, by reason; one with several is counted under the first.
        listed: the first losses in words.
    """

    pairs: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    lost: dict[str, Counter[str]] = field(default_factory=_by_stream)
    alone: dict[str, Counter[str]] = field(default_factory=_by_stream)
    rows: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    def add(self, account: Account, row: dict[str, Any], max_listed: int) -> None:
        """Counts one row."""
        self.pairs.update(account.pairs)
        self.cut.update(account.cut)
        for stream, loss in account.lost.items():
            self.lost[stream][loss.reason] += 1
            self.alone[stream][loss.reason] += bool(account.pairs)
        if not account.pairs:
            self.rows[next(iter(account.lost.values())).reason] += 1
        if account.lost and len(self.listed) < max_listed:
            told = dict.fromkeys(f"its {member_of(stream)}: {loss}" for stream, loss in account.lost.items())
            self.listed.append(f"{row_in_words(row)}: {'; '.join(told)}")

    def lines(self) -> list[str]:
        """The account for a log; nothing where nothing was lost or cut."""
        lines = [
            f"{stream} stream: {self.cut[stream]} {TABLE[stream].members} cut to --max_length."
            for stream in ORDER
            if self.cut[stream]
        ]
        for stream in ORDER:
            if lost := self.lost[stream].total():
                left = self.pairs[stream]
                lines.append(
                    f"{stream} stream: {left + lost} {TABLE[stream].members} encoded, {left} left and {lost} lost."
                )
        counted = [("rows dropped", self.rows)]
        counted += [(f"rows kept without the {member_of(stream)}", counts) for stream, counts in self.alone.items()]
        for what, counts in counted:
            lines += [f"{number} {what}: {reason}" for reason, number in counts.most_common() if number]
        more = sum(counts.total() for _, counts in counted) - len(self.listed)
        return lines + self.listed + ([f"… and {more} more."] if more else [])

    def require_pairs(self, streams: tuple[str, ...], files: list[str]) -> None:
        """Raises UserError where a stream in use has no pair left."""
        for stream in streams:
            if self.pairs[stream]:
                continue
            reasons = self.lost[stream] if self.pairs else self.rows
            what = f"no {member_of(stream)} is left" if self.pairs else "no row is left"
            too_long = any("--max_length" in reason for reason in reasons)
            raise UserError(
                f"{what}: {'; '.join(f'{number} {reason}' for reason, number in reasons.most_common(3))}",
                file=", ".join(files) or None,
                field="--max_length" if too_long else None,
                remedy="Raise it, or shorten the rows." if too_long else "Mend the rows; docs/rows.md says how.",
            )


@dataclass(frozen=True)
class MeasureRows:
    """Adds each row's index and sequence lengths, and in the column `bvpo_account` what became of its pairs."""

    template: Any
    version: int = _VERSION
    versions: tuple[str, ...] = field(default_factory=made_by)

    def batch(self, columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        names = [*columns, ROW_KEY]
        cells = zip(*columns.values(), indices, strict=True)
        rows = [self.preprocess(dict(zip(names, row, strict=True))) for row in cells]
        return {name: [row[name] for row in rows] for name in (*names, "lengths", ACCOUNT_COLUMN)}

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any]:
        row["lengths"] = []
        try:
            encoded, account = self.template.encode_with_account(row, return_length=True)
        except Exception as error:  # whatever a template raises for a row, the row is lost and must be counted
            loss = Loss(f"cannot be encoded ({type(error).__name__})", "mend the row or leave it out", _in_short(error))
            account = Account(lost=dict.fromkeys(self.template.bvpo.rules.streams, loss))
        else:
            row["lengths"] = encoded.get("lengths", [])
        row[ACCOUNT_COLUMN] = account.to_json()
        return row


def measure_dataset(
    dataset, template, *, num_proc: int, load_from_cache_file: bool, max_listed: int = 10
) -> tuple[Any, MeasuredRows]:
    """Returns (the rows with a pair that can be trained, with a column `lengths`; MeasuredRows)."""
    columns = {ROW_KEY: Value("int64"), "lengths": List(Value("int64")), ACCOUNT_COLUMN: Value("string")}
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    measured = map_rows(
        dataset,
        MeasureRows(template).batch,
        Features({**dataset.features, **columns}),
        num_proc=num_proc,
        load_from_cache_file=load_from_cache_file,
    )
    found = MeasuredRows()
    kept = []
    for i, text in enumerate(cells(measured, ACCOUNT_COLUMN)):
        account = Account.from_json(text)
        if account.pairs:
            kept.append(i)
        found.add(account, measured[i] if account.lost else {}, max_listed)
    return measured.remove_columns(ACCOUNT_COLUMN).select(kept), found


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
