"""The pass over a loaded dataset: number the rows, judge each, keep the usable ones, and say what was lost."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from swift.dataset import RowPreprocessor

from megatron_bvpo.data.batches import ROW_KEY
from megatron_bvpo.data.rows import RowRules, RowTally, RowVerdict, check_row

# Columns of ours that ms-swift must not drop as unknown.
EMPTY_COLUMNS = ("empty_response", "empty_rejected_response")
VERDICT_KEY = "bvpo_verdict"


class JudgeRows(RowPreprocessor):
    """Adds each row's verdict as JSON; keeps every row, so that none is lost without a count."""

    def __init__(self, rules: RowRules):
        super().__init__()
        self.rules = rules

    def _map_cache_file(self, fingerprint: str) -> str:
        # ms-swift names the cache after the input alone; other rules must not read this run's verdicts.
        key = hashlib.sha256(f"{fingerprint}|{self.rules}|{type(self).__name__}".encode()).hexdigest()[:32]
        return super()._map_cache_file(key)

    @staticmethod
    def _check_rejected_response(row: dict[str, Any]) -> None:
        """ms-swift raises for equal responses and the row vanishes; here it gets a verdict instead."""

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any]:
        row[VERDICT_KEY] = check_row(row, self.rules).to_json()
        return row


def judge_dataset(dataset, rules: RowRules, *, num_proc: int, load_from_cache_file: bool):
    """Returns (dataset with the usable rows and their numbers, RowTally).

    A streamed dataset cannot be counted ahead: it is returned as it is, with an empty tally; its bad rows
    are skipped by the template while training.
    """
    tally = RowTally()
    if not hasattr(dataset, "__len__"):
        return dataset, tally
    # datasets starts a worker process even for one; a pass this light is done before that process is up.
    processes = num_proc if num_proc > 1 else None
    judged = JudgeRows(rules)(dataset, num_proc=processes, load_from_cache_file=load_from_cache_file)
    kept = []
    for i, text in enumerate(judged[VERDICT_KEY]):
        verdict = RowVerdict.from_json(text)
        tally.add(verdict)
        if verdict.trace_ok or verdict.empty_ok:
            kept.append(i)
    judged = judged.remove_columns(VERDICT_KEY)
    if ROW_KEY in judged.column_names:
        judged = judged.remove_columns(ROW_KEY)
    judged = judged.add_column(ROW_KEY, np.arange(len(judged)))
    return judged.select(kept), tally


def length_lines(lengths: list[list[int]], streams: tuple[str, ...]) -> list[str]:
    """Distribution of sequence lengths (tokens, prompt included) of each stream, one line a stream."""
    by_stream: dict[str, list[int]] = {s: [] for s in streams}
    for row in lengths:
        # `lengths` lists the row's sequences in encoding order: the trace pair first, where there is one.
        parts = [row] if len(streams) == 1 else [row[:2], row[2:]]
        for stream, part in zip(streams, parts, strict=True):
            by_stream[stream] += [length for length in part if length]  # 0: a pair that was lost
    lines = []
    for stream, values in by_stream.items():
        if values:
            q = np.percentile(values, [5, 50, 95]).astype(int)
            lines.append(
                f"{stream} stream: {len(values) // 2} pairs, tokens a sequence: mean {np.mean(values):.0f}, "
                f"5 % {q[0]}, median {q[1]}, 95 % {q[2]}, longest {max(values)}, all {sum(values)}"
            )
    return lines
