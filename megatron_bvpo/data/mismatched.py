"""Each prompt with the response of another row: what KTO's baseline z is measured on (arXiv 2402.01306). Pure.

The next row's in the order of the **global** batch, cyclic, so that every layout measures the same. The first row's
stands behind the last prompt; one row alone has no other.

A sequence is a dict with `input_ids` and `labels`, as in pair_checks.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bvpo.data.pair_checks import IGNORED, response_start

# Where a row stands in a global batch. Sorted, these give its order.
Place = tuple[int, ...]


def placed_rows(
    batches: Sequence[Sequence[Any]], *, rank: int, dealt_in_turn: bool = True
) -> list[list[tuple[Place, dict]]]:
    """The rows of this rank's micro-batches, each with its place in the global batch, no two with the same.

    The order is that of the dataset's items, in every layout; where ranks hold micro-batches of unequal sizes, as at
    the end of a stream, it depends on the layout.

    Args:
        batches: the items of each micro-batch (a row, or a list of rows).
        dealt_in_turn: items go to the ranks one by one, as in training (gradients/halves.py), or a whole micro-batch
            each, as in evaluation.
    """
    found = []
    for j, items in enumerate(batches):
        rows: list[tuple[Place, dict]] = []
        for i, item in enumerate(items):
            item_place = (j, i, rank) if dealt_in_turn else (j, rank, i)
            rows += [((*item_place, k), row) for k, row in enumerate(item if isinstance(item, list) else [item])]
        found.append(rows)
    return found


def response_of(sequence: Mapping[str, Any]) -> list[int]:
    """The tokens of the response: what counts."""
    return list(sequence["input_ids"][response_start(sequence) :])


def next_responses(responses: Mapping[Place, list[int]]) -> dict[Place, list[int]]:
    """For each row, the response of the next one; nothing where there is one row only.

    Args:
        responses: of all rows of the global batch that have one, by their places.
    """
    order = sorted(responses)
    if len(order) < 2:
        return {}
    return {place: responses[after] for place, after in zip(order, [*order[1:], order[0]], strict=True)}


def with_response(sequence: Mapping[str, Any], response: Sequence[int], limit: int | None) -> dict[str, Any]:
    """The prompt of a sequence with another response, cut off at `limit` tokens, where one of its tokens is left.

    Returns:
        `input_ids`, `labels` and `length`.
    """
    start = response_start(sequence)
    room = len(response) if limit is None else max(limit - start, 1)
    ids = [*sequence["input_ids"][:start], *response[:room]]
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:], "length": len(ids)}
