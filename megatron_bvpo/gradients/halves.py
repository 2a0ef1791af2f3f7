"""The two halves of a step, the same in every layout, and the micro-batches of a probe's passes.

An item is what the dataset yields: a row, or a pack of rows. The sampler deals the items of a global batch
to the data-parallel ranks in turn, so item i of micro-batch j on rank r has the global number
(j·items + i)·ranks + r. Half A is the first half of these numbers, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from megatron_bvpo.data.batches import WEIGHT_KEY
from megatron_bvpo.data.encoded_rows import has_stream, sequence_names, tokens_of
from megatron_bvpo.streams import TABLE

HALVES = ("A", "B")


def half_of_items(n_batches: int, items: int, *, rank: int, ranks: int) -> list[list[str]]:
    """For each micro-batch of this rank, the half of each of its items."""
    total = n_batches * items * ranks
    return [
        ["A" if ((j * items + i) * ranks + rank) * 2 < total else "B" for i in range(items)] for j in range(n_batches)
    ]


def can_split(n_batches: int, *, pipeline: int, virtual: bool) -> bool:
    """True where each half is whole micro-batches on every rank, enough of them for the pipeline's schedule."""
    half, odd = divmod(n_batches, 2)
    return not odd and half > 0 and (not virtual or (half >= pipeline and half % pipeline == 0))


def rows_of_pass(
    batches: Sequence[Sequence[Any]], halves: Sequence[Sequence[str]], stream: str, half: str, *, split: bool
) -> list[list[dict]]:
    """Rows of the micro-batches of one pass, stream × half.

    Args:
        batches: the items of each micro-batch (a row, or a list of rows).
        halves: the half of each item.
        split: leave out the micro-batches of the other half; else all are run, the other half's pairs with
            weight 0.
    """
    chosen = []
    for items, sides in zip(batches, halves, strict=True):
        if split and sides[0] != half:
            continue
        rows = []
        for item, side in zip(items, sides, strict=True):
            for row in item if isinstance(item, list) else [item]:
                rows.append(row if split or side == half else {**row, WEIGHT_KEY: 0.0})
        chosen.append(one_stream(rows, stream))
    return chosen


def one_stream(rows: Sequence[dict], stream: str) -> list[dict]:
    """The rows with `stream`'s sequences only.

    Each stream is collated for itself, because cutting it out of a collated pack would break the padding to
    a multiple of the tensor-parallel size. Where no row has the stream, the shortest member of another stands in with
    weight 0: every rank must run the same passes.
    """
    return some_streams(rows, (stream,))


def some_streams(rows: Sequence[dict], streams: Collection[str]) -> list[dict]:
    """The rows with the sequences of these streams only; a stand-in of weight 0 where none has any."""
    others = tuple(name for other in TABLE if other not in streams for name in sequence_names(other))
    mine = [row for row in rows if any(has_stream(row, stream) for stream in streams)]
    return [{key: value for key, value in row.items() if not key.startswith(others)} for row in mine] or [
        stand_in(rows)
    ]


def stand_in(rows: Sequence[dict]) -> dict:
    """The shortest member of any stream, with weight 0."""
    found = [(row, name) for name in TABLE for row in rows if has_stream(row, name)]
    row, stream = min(found, key=lambda one: tokens_of(*one))
    return {**only(row, stream), WEIGHT_KEY: 0.0}


def only(row: dict, stream: str) -> dict:
    """The row with `stream`'s sequences and no others."""
    others = tuple(name for other in TABLE if other != stream for name in sequence_names(other))
    return {key: value for key, value in row.items() if not key.startswith(others)}
