"""What is counted of rows, and how it is told."""

import pytest

from megatron_bvpo.data.rows import RowRules, RowTally, check_row, require_rows
from megatron_bvpo.errors import UserError
from tests.unit.sample_rows import ALONE, OWN, RULES, row


def test_tally():
    tally = RowTally()
    for entry in (row(), row(**OWN), row(empty_response="4"), row(chosen="x"), row(chosen="y"), {}):
        tally.add(check_row(entry, RULES))
    assert (tally.rows, tally.kept, tally.trace_pairs, tally.empty_pairs) == (6, 3, 3, 2)
    assert tally.lines() == [
        "6 rows read, 3 kept.",
        "3 trace pairs, 2 empty pairs (1 with their own answers, 1 with stripped answers).",
        "3 rows dropped:",
        "  2 × messages: no trace, neither <think> nor </think>",
        "  1 × messages: missing",
        "1 row kept without the empty pair:",
        "  1 × empty_rejected_response: missing, the other empty answer is there",
    ]
    tally.add(check_row(ALONE, RULES))
    assert tally.lines()[:3] == [
        "7 rows read, 4 kept.",
        "3 trace pairs, 3 empty pairs (2 with their own answers, 1 with stripped answers).",
        "1 row with an empty pair alone.",
    ]
    other = RowTally()
    other.add(check_row({}, RULES))
    assert tally.merge(other) is tally
    assert (tally.rows, tally.kept, tally.alone["empty"]) == (8, 4, 1)
    assert tally.dropped["messages: missing"] == 2


def test_reasons_do_not_split_by_row():
    tally = RowTally()
    for role in ("boss", "chef"):
        tally.add(check_row({**row(), "messages": [{"role": role, "content": "q"}]}, RULES))
    assert list(tally.dropped.values()) == [2]


def test_nothing_left_is_an_error():
    tally = RowTally()
    tally.add(check_row(row(chosen="x"), RULES))
    with pytest.raises(UserError, match="no row is left to train on: 1 read, all dropped .*no trace") as caught:
        require_rows(tally, ["a.jsonl", "b.jsonl"])
    assert caught.value.file == "a.jsonl, b.jsonl" and caught.value.remedy
    tally.add(check_row(row(empty_response="4"), RULES))
    require_rows(tally, ["a.jsonl"])
    with pytest.raises(UserError, match="no empty pair is left in 1 row"):
        require_rows(tally, ["a.jsonl"], RULES)
    require_rows(tally, ["a.jsonl"], RowRules(streams=("trace",)))
    tally.add(check_row(row(), RULES))
    require_rows(tally, ["a.jsonl"], RULES)
    with pytest.raises(UserError, match="no row is left"):
        require_rows(RowTally(), ["a.jsonl"])


def test_where_the_empty_answers_come_from_is_told_in_shares():
    tally = RowTally(rows=8, own=2, stripped=1)
    tally.dropped["a reason"] = 4
    said = tally.empty_line()
    assert said.startswith(
        "empty stream: of 4 rows 50 % have own answers, 25 % have stripped ones, 25 % have none. A st"
    )
    assert RowTally(rows=2, own=2).empty_line().endswith("0 % have none.") and RowTally().empty_line() is None
