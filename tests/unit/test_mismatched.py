"""Each prompt with another row's response."""

import pytest

from megatron_bvpo.data.mismatched import next_responses, placed_rows, response_of, with_response


def sequence(prompt, response):
    return {"input_ids": [*prompt, *response], "labels": [-100] * len(prompt) + list(response), "loss_scale": None}


def test_the_next_one_in_global_order_whoever_holds_it():
    """Places are (number of the item in the global batch, row of its pack); ranks come in any order."""
    responses = {(2, 0): [20], (0, 1): [1], (10, 0): [100], (0, 0): [0], (3, 0): [30]}
    found = next_responses(responses)
    order = [(0, 0), (0, 1), (2, 0), (3, 0), (10, 0)]
    assert [found[place] for place in order] == [[1], [20], [30], [100], [0]]


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 3)])
def test_places_are_the_same_in_every_layout(ranks, size, in_turn):
    """24 items, every third a pack of two rows: dealt as ms-swift's sampler does in training, or ours in evaluation."""
    items = [[{"row": i}, {"row": i + 0.5}] if i % 3 == 0 else {"row": i} for i in range(24)]
    found = []
    for rank in range(ranks):
        if in_turn:
            mine = items[rank::ranks]
            batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        else:
            batches = [items[i : i + size] for i in range(rank * size, len(items), ranks * size)]
        placed = placed_rows(batches, rank=rank, dealt_in_turn=in_turn)
        assert [len(rows) for rows in placed] == [sum(2 if i % 3 == 0 else 1 for i in map(number, b)) for b in batches]
        found += [pair for rows in placed for pair in rows]
    rows = [row["row"] for _, row in sorted(found, key=lambda pair: pair[0])]
    assert rows == sorted(rows) and len(rows) == 32


@pytest.mark.parametrize("in_turn", [True, False])
def test_uneven_micro_batches_share_no_place(in_turn):
    """The end of a stream."""
    found = [
        place
        for rank, batches in enumerate([[[{}, {}], [{}]], [[{}], [[{}, {}], {}]]])
        for rows in placed_rows(batches, rank=rank, dealt_in_turn=in_turn)
        for place, _ in rows
    ]
    assert len(set(found)) == len(found) == 7


def number(item) -> int:
    return int((item[0] if isinstance(item, list) else item)["row"])


@pytest.mark.parametrize("responses", [{}, {(0, 0): [1, 2]}])
def test_one_response_has_no_other(responses):
    assert next_responses(responses) == {}


def test_the_prompt_stays_and_the_response_counts():
    mine, other = sequence([1, 2, 3], [4, 5]), sequence([9], [6, 7, 8])
    assert with_response(mine, response_of(other), None) == {
        "input_ids": [1, 2, 3, 6, 7, 8],
        "labels": [-100, -100, -100, 6, 7, 8],
        "length": 6,
    }


@pytest.mark.parametrize(("limit", "kept"), [(6, [6, 7, 8]), (5, [6, 7]), (4, [6]), (3, [6])])
def test_a_response_that_is_too_long_is_cut(limit, kept):
    found = with_response(sequence([1, 2, 3], [4]), [6, 7, 8], limit)
    assert found["input_ids"][3:] == found["labels"][3:] == kept and found["length"] == 3 + len(kept)
