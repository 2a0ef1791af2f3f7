"""Each prompt with another row's response."""

import pytest

from megatron_bvpo.data.mismatched import next_responses, response_of, with_response


def sequence(prompt, response):
    return {"input_ids": [*prompt, *response], "labels": [-100] * len(prompt) + list(response), "loss_scale": None}


def test_the_next_one_in_global_order_whoever_holds_it():
    """Places are (number of the item in the global batch, row of its pack); ranks come in any order."""
    responses = {(2, 0): [20], (0, 1): [1], (10, 0): [100], (0, 0): [0], (3, 0): [30]}
    found = next_responses(responses)
    order = [(0, 0), (0, 1), (2, 0), (3, 0), (10, 0)]
    assert [found[place] for place in order] == [[1], [20], [30], [100], [0]]


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
