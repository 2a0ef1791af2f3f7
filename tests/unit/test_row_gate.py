"""HPT's gate over rows."""

from dataclasses import replace

import pytest

from megatron_bvpo.data.gate import gate_streams
from megatron_bvpo.data.rows import (
    STREAMS_KEY,
    RowTally,
    check_row,
    normalise_row,
    require_rows,
)
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import ORDER
from tests.unit.sample_rows import ALL, EXPERT, GATE, OWN, PROMPT, SHORT, row


@pytest.mark.parametrize(
    ("rate", "threshold", "left"),
    [
        (0.0, 0.0, ("expert",)),
        (0.125, 0.0, ("trace", "empty", "short")),
        (0.25, 0.25, ("expert",)),
        (1.0, 0.25, ("trace", "empty", "short")),
        (1.0, 1.0, ("expert",)),
    ],
)
def test_the_gate(rate, threshold, left):
    assert gate_streams(rate, threshold, ORDER) == left
    rules = replace(ALL, gate_threshold=threshold)
    for value in (rate, str(rate)):
        entry = row(**OWN, **SHORT, **EXPERT, accept_rate=value)
        verdict = check_row(entry, rules)
        assert verdict.streams == left and verdict.gated == tuple(s for s in ORDER if s not in left)
        assert verdict.empty_source == ("own" if "empty" in left else None)
        normal = normalise_row(entry, verdict, rules)
        assert normal[STREAMS_KEY] == list(left)
        assert (normal["expert_response"] is None) == (normal["short_response"] is not None) == ("short" in left)


def test_without_a_gate_accept_rate_says_nothing():
    for value in (0.0, 1.0, "often", None):
        assert check_row(row(**EXPERT, accept_rate=value), ALL).streams == ("trace", "empty", "expert")


@pytest.mark.parametrize(
    ("given_row", "told"),
    [
        (
            row(**EXPERT),
            "accept_rate: missing, and --bvpo_gate goes by it (`bvpo pairs` writes it into its rows; for ",
        ),
        (row(accept_rate=""), "accept_rate: missing"),
        (row(accept_rate=50), "accept_rate: expected a number from 0 to 1, found the number 50"),
        (row(accept_rate=True), "accept_rate: expected a number"),
        (row(accept_rate=float("nan")), "accept_rate: expected a number"),
        (row(accept_rate=0.0), "accept_rate: the gate switches off all that the row has"),
        ({**PROMPT, **EXPERT, "accept_rate": 0.5}, "accept_rate: the gate switches off all that the row has"),
    ],
)
def test_rows_that_the_gate_leaves_nothing_of(given_row, told):
    verdict = check_row(given_row, GATE)
    assert not verdict.kept and str(verdict.problems[0]).startswith(told) and verdict.problems[0].drops == "row"


def test_the_count_behind_a_gate():
    tally = RowTally()
    for entry in (row(**EXPERT, accept_rate=0.5), row(**EXPERT, accept_rate=0), row(accept_rate=0)):
        tally.add(check_row(entry, GATE))
    assert tally.lines() == [
        "3 rows read, 2 kept.",
        "1 trace pair, 1 empty pair (0 with their own answers, 1 with stripped answers), 1 demonstration.",
        "1 row with a demonstration alone.",
        "Switched off by the gate: 2 trace pairs, 2 empty pairs, 1 demonstration.",
        "1 row dropped:",
        "  1 × accept_rate: the gate switches off all that the row has",
    ]


def test_a_gate_without_rates_or_that_switches_all_off_is_refused():
    tally = RowTally()
    tally.add(check_row(row(**EXPERT), GATE))
    with pytest.raises(
        UserError, match=r"no row is left .*1 × accept_rate: missing, and --bvpo_gate goes by"
    ) as caught:
        require_rows(tally, ["a.jsonl"])
    assert caught.value.remedy.startswith("`bvpo pairs` writes it into its rows; for other prompts count")
    tally = RowTally()
    tally.add(check_row(row(**OWN, **SHORT, accept_rate=0.5), GATE))
    with pytest.raises(UserError, match="no demonstration is left in 1 row"):
        require_rows(tally, ["a.jsonl"], GATE)
    tally.add(check_row({**PROMPT, **EXPERT, "accept_rate": 1}, GATE))
    with pytest.raises(UserError, match=r"no demonstration is left in 1 row \(1 × switched off by the gate\)"):
        require_rows(tally, ["a.jsonl"], GATE)
