"""Rows as ms-swift loads them: brought to one form, judged, and counted, so that none is lost without a reason.

Rows of local files were judged as they were read (data/handover.py). All others (hub data sets, registered
preprocessors, cached data sets) are judged here, after loading.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Json, List, Value
from swift.dataset import RowPreprocessor

from megatron_bvpo.data.batches import ROW_KEY
from megatron_bvpo.data.handover import (
    COLUMNS,
    LIST_COLUMNS,
    OBJECT_COLUMNS,
    SOURCE_KEY,
    STREAM_COLUMNS,
    TYPES,
    VALUE_COLUMNS,
    VERDICT_KEY,
    FileReport,
    Reading,
    handed_over,
)
from megatron_bvpo.data.mapping import made_by, map_rows
from megatron_bvpo.data.rows import RowProblem, RowVerdict, require_rows
from megatron_bvpo.streams import TABLE

# Columns of ours that ms-swift must not drop as unknown.
PACKED_KEY = "bvpo_packed"
OUR_COLUMNS = (*STREAM_COLUMNS, *VALUE_COLUMNS, SOURCE_KEY, VERDICT_KEY, ROW_KEY, PACKED_KEY)


def _value(name: str) -> Value:
    return Value(TYPES.get(name, "string"))


FEATURES = Features(
    {
        name: List(Json()) if name in LIST_COLUMNS else Json() if name in OBJECT_COLUMNS else _value(name)
        for name in COLUMNS
    }
)


@dataclass(frozen=True)
class JudgeRows:
    """Brings rows to the one form, and adds each one's verdict; a dropped row keeps its place, empty."""

    reading: Reading
    versions: tuple[str, ...] = field(default_factory=made_by)

    def one(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        if row.get(PACKED_KEY) is not None:
            row = json.loads(row[PACKED_KEY])
        if row.get(VERDICT_KEY) is not None:
            return {name: row.get(name) for name in COLUMNS}
        source = row.get(SOURCE_KEY) or f"row {index + 1}"
        new, verdict = self.reading.canonical({key: value for key, value in row.items() if key != SOURCE_KEY})
        return {name: new.get(name) for name in COLUMNS} | {SOURCE_KEY: source, VERDICT_KEY: verdict.to_json()}

    def batch(self, columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        names = list(columns)
        rows = [dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        found = [self.one(row, index) for row, index in zip(rows, indices, strict=True)]
        return {name: [row[name] for row in found] for name in COLUMNS}


def load_file(path: str, reading: Reading, streaming: bool) -> tuple[Dataset | IterableDataset, FileReport]:
    """(the kept rows of a local file, its counts).

    Raises:
        UserError: see `handed_over`; or no row is kept.
    """
    arrow, report = handed_over(path, reading)
    require_rows(report.tally, [path])
    dataset = Dataset.from_file(arrow)
    return (dataset.to_iterable_dataset() if streaming else dataset), report


def cells(dataset: Dataset, column: str) -> Iterator[Any]:
    """The cells of one column, read in batches: `dataset[column]` goes through all columns' formats for each row."""
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        yield from batch.column(0).to_pylist()


def judged(dataset, reading: Reading, *, num_proc: int | None = None, load_from_cache_file: bool = True):
    """The dataset in the one form, with a verdict for every row; as it is where it has that already.

    Args:
        dataset: sized or streamed, with any columns.
    """
    judge = JudgeRows(reading)
    if not hasattr(dataset, "__len__"):
        if dataset.features == FEATURES:
            return dataset
        columns = list(RowPreprocessor.get_features_dataset(dataset).features)
        return dataset.map(judge.one, with_indices=True, remove_columns=columns, features=FEATURES)
    if VERDICT_KEY in dataset.column_names and all(text is not None for text in cells(dataset, VERDICT_KEY)):
        return dataset
    return map_rows(dataset, judge.batch, FEATURES, num_proc=num_proc, load_from_cache_file=load_from_cache_file)


def judge_dataset(dataset, reading: Reading, *, num_proc: int, load_from_cache_file: bool):
    """Returns (dataset with the usable rows, FileReport).

    A streamed dataset cannot be counted ahead: it is returned with its verdicts, and an empty report; the template
    counts what it cannot use while training.
    """
    dataset = judged(dataset, reading, num_proc=num_proc, load_from_cache_file=load_from_cache_file)
    report = FileReport()
    if not hasattr(dataset, "__len__"):
        return dataset, report
    kept = []
    for i, (source, text) in enumerate(zip(cells(dataset, SOURCE_KEY), cells(dataset, VERDICT_KEY), strict=True)):
        verdict = RowVerdict.from_json(text)
        report.add(source or f"row {i + 1}", verdict)
        if verdict.kept:
            kept.append(i)
    dataset = dataset.remove_columns(VERDICT_KEY)
    return (dataset if len(kept) == len(dataset) else dataset.select(kept)), report


class NumberedRows:
    """A dataset whose rows know their index, for rows that are encoded while training.

    Not a column: datasets would write a shuffled dataset anew to add one, every rank for itself.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str):
        row = self.rows[index]
        return row if isinstance(index, str) else {**row, ROW_KEY: index}


@dataclass(frozen=True)
class PackRows:
    """Runs a preprocessor of ms-swift over a batch and loses no row: each comes back as one JSON text.

    ms-swift deletes a row over which its preprocessor stumbles, and datasets takes the columns' types from the first
    thousand rows. A text is neither deleted nor mistaken, and `judged` unpacks it.
    """

    preprocessor: RowPreprocessor
    reading: Reading

    def batch(self, columns: dict[str, list], *, strict: bool, ignore_max_length_error: bool) -> dict[str, list]:
        columns = dict(columns)
        self.preprocessor._remove_prefix_keys(columns, "__@")  # as ms-swift renames the columns of streams
        found = []
        for row in self.preprocessor.batched_to_rows(columns):
            source = {SOURCE_KEY: row.pop(SOURCE_KEY, None)}
            try:
                found += [{**made, **source} for made in self._made(row)]
            except Exception as error:  # whatever it raises for a row, the row is lost and must be counted
                if strict:
                    raise
                said = " ".join(f"{type(error).__name__} {error}".split())[:200]
                found.append({**_lost("ms-swift's preprocessor cannot read it", said), **source})
        return {PACKED_KEY: [json.dumps(row, ensure_ascii=False) for row in found]}

    def _made(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        made = self.preprocessor.preprocess(row)
        if not made:
            return [_lost("left out by the data set's own preprocessor", "")]
        rows = [made] if isinstance(made, dict) else made
        judged_rows = []
        for row in rows:
            new, verdict = self.reading.canonical(row)
            judged_rows.append({**new, VERDICT_KEY: verdict.to_json()})
        return judged_rows


def with_sources(dataset):
    """The dataset with the column `bvpo_source`: the number of each row, from 1 on."""
    if SOURCE_KEY in (dataset.column_names or ()):
        return dataset
    if hasattr(dataset, "__len__"):
        return dataset.add_column(SOURCE_KEY, [f"row {i + 1}" for i in range(len(dataset))])
    return dataset.map(lambda row, i: {SOURCE_KEY: f"row {i + 1}"}, with_indices=True)


def _lost(reason: str, detail: str) -> dict[str, Any]:
    """What stands for a row that could not be loaded."""
    problem = RowProblem("row", reason, "mend the row or leave it out", found=detail)
    return {VERDICT_KEY: RowVerdict(problems=(problem,)).to_json()}


def length_lines(lengths: Iterable[list[int]], streams: tuple[str, ...]) -> list[str]:
    """Distribution of sequence lengths (tokens, prompt included) of each stream, one line a stream."""
    by_stream: dict[str, list[int]] = {s: [] for s in streams}
    for row in lengths:
        # `lengths` lists the row's sequences in encoding order: stream by stream, side by side.
        first = 0
        for stream in streams:
            after = first + len(TABLE[stream].sides)
            by_stream[stream] += [length for length in row[first:after] if length]  # 0: what was lost
            first = after
    lines = []
    for stream, values in by_stream.items():
        if values:
            q = np.percentile(values, [5, 50, 95]).astype(int)
            members = f"{len(values) // len(TABLE[stream].sides)} {TABLE[stream].members}"
            lines.append(
                f"{stream} stream: {members}, tokens a sequence: mean {np.mean(values):.0f}, "
                f"5 % {q[0]}, median {q[1]}, 95 % {q[2]}, longest {max(values)}, all {sum(values)}"
            )
    return lines
