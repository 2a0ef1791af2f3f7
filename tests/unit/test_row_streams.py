"""Rows of the other streams: short pairs, demonstrations, single responses with labels, and the gate."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.gate import gate_streams
from megatron_bvpo.data.handover import FileReport, Reading, handed_over, judged_rows
from megatron_bvpo.data.rows import (
    ALONE_KEY,
    STREAMS_KEY,
    RowRules,
    RowTally,
    RowVerdict,
    check_row,
    normalise_row,
    require_rows,
)
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import ORDER
from tests.unit.sample_rows import CHOSEN, OWN, REJECTED, row, talk

ALL = RowRules(streams=ORDER)
KTO = RowRules(streams=("trace", "empty", "expert"), unpaired=True)
GATE = replace(ALL, gate_threshold=0.0)
PROMPT = {"messages": talk()[:1]}
SHORT = {"short_response": "<think>\nTwo.\n</think>\n\n4", "short_rejected_response": "Hm.</think>5"}
EXPERT = {"expert_response": "<think>\n2+2\n</think>\n\nFour."}
SINGLE = {"messages": talk(), "label": True}

# --- what a row gives ---

# name: (row, rules, streams)
GIVES = {
    "everything": (row(**OWN, **SHORT, **EXPERT), ALL, ORDER),
    "nothing more than a pair": (row(), ALL, ("trace", "empty")),
    "blank cells": (row(**dict.fromkeys([*SHORT, *EXPERT], "")), ALL, ("trace", "empty")),
    "a short pair": (row(**SHORT), ALL, ("trace", "empty", "short")),
    "a demonstration": (row(**EXPERT), RowRules(streams=("trace", "expert")), ("trace", "expert")),
    "streams that are not run": (row(**OWN, **SHORT, **EXPERT), RowRules(streams=("short",)), ("short",)),
    "a demonstration alone": ({**PROMPT, **EXPERT}, ALL, ("expert",)),
    "a demonstration alone, own answers wanted": (
        {**PROMPT, **EXPERT},
        RowRules("require", ORDER),
        ("expert",),
    ),
    "a short pair alone": ({**PROMPT, **SHORT}, ALL, ("short",)),
    "all but a trace pair": ({**PROMPT, **OWN, **SHORT, **EXPERT}, ALL, ("empty", "short", "expert")),
    "a demonstration with an empty trace": (
        row(expert_response="<think>\n\n</think>\n\nFour."),
        ALL,
        ("trace", "empty", "expert"),
    ),
    "no demonstration in a run of them": (row(**EXPERT), RowRules(streams=("expert",)), ("expert",)),
    "one response": (SINGLE, KTO, ("trace", "empty")),
    "one response and a demonstration": ({**SINGLE, **EXPERT}, KTO, ("trace", "empty", "expert")),
    "one answer alone": ({**PROMPT, "empty_response": "4", "empty_label": 0}, KTO, ("empty",)),
    "a pair with a label": (row(label="false"), KTO, ("trace", "empty")),
}


@pytest.mark.parametrize("case", GIVES)
def test_what_a_row_gives(case):
    given_row, rules, streams = GIVES[case]
    verdict = check_row(given_row, rules)
    assert (verdict.streams, verdict.problems) == (streams, ())
    normal = normalise_row(given_row, verdict, rules)
    assert normal[STREAMS_KEY] == list(streams) and normalise_row(normal, verdict, rules) == normal
    for stream, names in (("short", SHORT), ("expert", EXPERT)):
        for name in names:
            text = normal.get(name)
            assert (text is not None) == (stream in streams) and (text or "<think>").startswith("<think>")


def test_normal_form_of_all_four():
    normal = normalise_row(row(**SHORT, **EXPERT), check_row(row(**SHORT, **EXPERT), ALL), ALL)
    assert normal == {
        **row(**EXPERT),
        "short_response": SHORT["short_response"],
        "short_rejected_response": "<think>\nHm.</think>5",
        "empty_response": "It is 4.",
        "empty_rejected_response": "It is 5.",
        STREAMS_KEY: list(ORDER),
    }


@pytest.mark.parametrize(
    ("given_row", "response", "rejected"),
    [
        ({**PROMPT, **EXPERT}, EXPERT["expert_response"], ""),
        ({**PROMPT, **SHORT, **EXPERT}, SHORT["short_response"], "<think>\nHm.</think>5"),
        ({**PROMPT, **OWN, **EXPERT}, "4", "5"),
    ],
)
def test_normal_form_without_a_trace_pair(given_row, response, rejected):
    """ms-swift wants a response on either side, and two different ones."""
    normal = normalise_row(given_row, check_row(given_row, ALL), ALL)
    assert normal["messages"] == talk(response) and normal["rejected_response"] == rejected and normal[ALONE_KEY]


# name: (row, rules, streams that are left, start of what is said, what it costs)
LOSES = {
    "half a short pair": (
        row(short_response="<think>a</think>4"),
        ALL,
        ("trace", "empty"),
        "short_rejected_response: missing, the other short response is there (give both",
        "short",
    ),
    "equal short responses": (
        row(**{**SHORT, "short_rejected_response": f" {SHORT['short_response']}"}),
        ALL,
        ("trace", "empty"),
        "short_rejected_response: the same text",
        "short",
    ),
    "a short trace cut off": (
        row(**{**SHORT, "short_response": "<think>Two"}),
        ALL,
        ("trace", "empty"),
        "short_response: no </think>",
        "short",
    ),
    "a short response of another type": (
        row(**{**SHORT, "short_response": 4}),
        ALL,
        ("trace", "empty"),
        "short_response: expected text, found the number 4",
        "short",
    ),
    "no traces in a short pair": (
        row(short_response="<think></think>4", short_rejected_response="<think></think>5"),
        ALL,
        ("trace", "empty"),
        "short_response: neither response has a trace",
        "short",
    ),
    "a demonstration without a trace": (
        row(expert_response="Four."),
        ALL,
        ("trace", "empty"),
        "expert_response: no trace, neither <think> nor </think>",
        "expert",
    ),
    "a demonstration that is no text": (
        row(expert_response=["Four."]),
        ALL,
        ("trace", "empty"),
        "expert_response: expected text, found a list",
        "expert",
    ),
    "a bad trace pair costs all": (
        row(rejected="<think>cut", **OWN, **SHORT, **EXPERT),
        ALL,
        (),
        "rejected_response: no </think>",
        "row",
    ),
    "own answers required": (row(**EXPERT), RowRules("require", ORDER), (), "empty_response: missing", "row"),
    "a bad demonstration alone": (
        {**PROMPT, "expert_response": "<think>cut"},
        ALL,
        (),
        "expert_response: no </think>",
        "row",
    ),
    "a demonstration that nobody runs": (
        {**PROMPT, **EXPERT},
        RowRules(),
        (),
        "expert_response: a demonstration alone, and no expert stream is run (add a trace pair, or run the expert",
        "row",
    ),
    "no demonstration": (
        row(),
        RowRules(streams=("expert",)),
        (),
        "expert_response: missing, and the row has nothing else to train",
        "row",
    ),
    "no label": (
        {"messages": talk()},
        KTO,
        (),
        "label: missing, and this --loss_type takes single responses, right or wrong (say true or false, or choose",
        "row",
    ),
    "an odd label": ({**SINGLE, "label": "good"}, KTO, (), "label: expected true or false, found text 'good'", "row"),
    "an own answer without a label": (
        {**SINGLE, "empty_response": "4"},
        KTO,
        ("trace",),
        "empty_label: missing",
        "empty",
    ),
    "a rejected answer alone": (
        {**PROMPT, "empty_rejected_response": "4", "label": 1},
        KTO,
        (),
        "empty_response: missing",
        "row",
    ),
    "an answer required": (SINGLE, replace(KTO, empty="require"), (), "empty_response: missing", "row"),
    "a response cut off": ({"messages": talk("<think>so"), "label": 0}, KTO, (), "messages: no </think>", "row"),
}


@pytest.mark.parametrize("case", LOSES)
def test_what_a_row_loses(case):
    given_row, rules, streams, told, drops = LOSES[case]
    verdict = check_row(given_row, rules)
    assert verdict.streams == streams
    problem = verdict.problems[0]
    assert str(problem).startswith(told) and problem.drops == drops
    assert verdict.lost == ({drops: problem} if streams else {})
    if streams:
        assert normalise_row(given_row, verdict, rules)[STREAMS_KEY] == list(streams)


def test_two_losses_of_one_row_are_both_counted():
    tally = RowTally()
    tally.add(check_row(row(empty_response="4", short_response="<think>a</think>4", **EXPERT), ALL))
    assert tally.lines() == [
        "1 row read, 1 kept.",
        "1 trace pair, 0 empty pairs (0 with their own answers, 0 with stripped answers), 1 demonstration.",
        "1 row kept without the empty pair:",
        "  1 × empty_rejected_response: missing, the other empty answer is there",
        "1 row kept without the short pair:",
        "  1 × short_rejected_response: missing, the other short response is there",
    ]


def test_each_stream_in_use_must_have_something():
    tally = RowTally()
    tally.add(check_row(row(), ALL))
    with pytest.raises(UserError, match="no short pair is left in 1 row"):
        require_rows(tally, ["a.jsonl"], ALL)
    tally.add(check_row(row(**SHORT), ALL))
    with pytest.raises(UserError, match="no demonstration is left in 2 rows"):
        require_rows(tally, ["a.jsonl"], ALL)
    tally.add(check_row({**PROMPT, **EXPERT}, ALL))
    require_rows(tally, ["a.jsonl"], ALL)
    assert "1 row with a demonstration alone." in tally.lines()


# --- single responses ---


@pytest.mark.parametrize(
    ("value", "right"),
    [(True, True), (False, False), (1, True), (0, False), ("True", True), (" false", False), ("1.0", True)],
)
def test_labels(value, right):
    single = {**SINGLE, "label": value}
    verdict = check_row(single, KTO)
    assert verdict.right == (("trace", "empty") if right else ())
    normal = normalise_row(single, verdict, KTO)
    assert (normal["label"], normal["empty_label"]) == (right, right)
    assert (normal["empty_response"], normal["empty_rejected_response"]) == ("It is 4.", None)
    assert normal["rejected_response"] == "" and "rejected_messages" not in normal


def test_an_own_answer_has_a_label_of_its_own():
    single = {**SINGLE, "empty_response": "<think>\n\n</think>\n\n5", "empty_label": False}
    verdict = check_row(single, KTO)
    assert (verdict.right, verdict.empty_source) == (("trace",), "own")
    normal = normalise_row(single, verdict, KTO)
    assert (normal["label"], normal["empty_label"], normal["empty_response"]) == (True, False, "5")


def test_the_rejected_side_of_a_pair_is_no_single_response():
    entry = {"messages": talk(), "rejected_messages": talk("<think>"), "label": True}
    normal = normalise_row(entry, check_row(entry, KTO), KTO)
    assert normal["rejected_response"] == "" and "rejected_messages" not in normal


def test_the_count_of_single_responses():
    tally = RowTally()
    for entry in (SINGLE, {**SINGLE, "label": False, "empty_response": "4", "empty_label": True}, {"messages": talk()}):
        tally.add(check_row(entry, KTO))
    assert tally.lines() == [
        "3 rows read, 2 kept.",
        "2 trace responses (1 right, 1 wrong), 2 empty responses (2 right, 0 wrong; 1 with their own answers, 1 with "
        "stripped answers).",
        "1 row dropped:",
        "  1 × label: missing, and this --loss_type takes single responses, right or wrong",
    ]
    other = RowTally()
    other.add(check_row(SINGLE, KTO))
    assert tally.merge(other).right == {"trace": 2, "empty": 3}
    assert RowTally().merge(tally).lines() == tally.lines()


def test_a_stream_without_labels_is_refused():
    with pytest.raises(UserError, match="--bvpo_streams: rows have no label for the stream short"):
        RowRules(streams=("trace", "short"), unpaired=True)


# --- the gate ---


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


# --- from a file ---


def read(tmp_path, monkeypatch, entries, rules):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    arrow, report = handed_over(str(tmp_path / "a.jsonl"), Reading(rules))
    with pa.memory_map(arrow) as source:
        return pa.ipc.open_stream(source).read_all(), report


def test_the_columns_of_a_file(tmp_path, monkeypatch):
    """Their types are the same whatever comes first."""
    entries = [row(), row(**SHORT, **EXPERT, accept_rate="0.25", label="true"), {**PROMPT, **EXPERT, "accept_rate": 1}]
    table, report = read(tmp_path, monkeypatch, entries, ALL)
    types = {name: str(table.schema.field(name).type) for name in ("label", "empty_label", "accept_rate", *EXPERT)}
    assert list(types.values()) == ["bool", "bool", "double", "string"]
    rows = table.to_pylist()
    assert [entry["accept_rate"] for entry in rows] == [None, 0.25, 1.0] and rows[1]["label"] is True
    assert {name: rows[1][name] for name in SHORT} == SHORT and rows[2]["expert_response"] == EXPERT["expert_response"]
    assert rows[2]["rejected_response"] is None and len(rows[2]["messages"]) == 1
    assert RowVerdict.from_json(rows[2]["bvpo_verdict"]) == check_row(entries[2], ALL)
    again = handed_over(str(tmp_path / "a.jsonl"), Reading(ALL))[1]
    assert again == report and again.tally.lines() == report.tally.lines()


def test_single_responses_of_a_file(tmp_path, monkeypatch):
    entries = [SINGLE, {**PROMPT, "empty_response": "4", "empty_label": "0"}]
    table, report = read(tmp_path, monkeypatch, entries, KTO)
    rows = table.to_pylist()
    assert [(entry["label"], entry["empty_label"]) for entry in rows] == [(True, None), (None, False)]
    assert report.tally.right == {"trace": 1, "empty": 1}
    assert read(tmp_path, monkeypatch, entries, KTO)[1] == report


@pytest.mark.parametrize(
    ("entry", "rules", "told"),
    [
        ({**SINGLE, "label": "good"}, KTO, "a.jsonl:2: label: expected true or false, found text 'good'. Say true"),
        (row(accept_rate=50), GATE, "a.jsonl:2: accept_rate: expected a number from 0 to 1, found the number 50."),
        (row(expert_response=4), ALL, "a.jsonl:2: expert_response: expected text, found the number 4. Mend the row"),
    ],
)
def test_a_value_of_the_wrong_type_stops_the_run(entry, rules, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = row(label=True, accept_rate=0.5)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (good, entry)))
    with pytest.raises(UserError) as caught:
        list(judged_rows("a.jsonl", Reading(rules), FileReport()))
    assert str(caught.value).startswith(told)


# Rows of a table or of another tool: (columns, rules, what is made of it)
FORMS = {
    "a prompt and a demonstration": ({"problem": "What is 2+2?", **EXPERT}, ALL, {**PROMPT, **EXPERT}),
    "and the judge's answer": ({"question": "What is 2+2?", "answer": "4", **EXPERT}, ALL, {**PROMPT, **EXPERT}),
    "a table's blank cells": (
        {"prompt": "What is 2+2?", "response": "", "rejected_response": "", "label": "", **SHORT},
        ALL,
        {**PROMPT, **SHORT},
    ),
    "TRL's KTO": ({"prompt": "What is 2+2?", "completion": CHOSEN, "label": True}, KTO, SINGLE),
    "ms-swift's KTO": ({"messages": talk(), "label": False}, KTO, {**SINGLE, "label": False}),
    "a pair": (
        {"query": "What is 2+2?", "response": CHOSEN, "rejected_response": REJECTED, **EXPERT},
        ALL,
        row(**EXPERT),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    given_row, rules, made = FORMS[form]
    new, verdict = Reading(rules).canonical(given_row)
    assert verdict.kept and {name: value for name, value in new.items() if value is not None} == made


def test_bvpo_rows_counts_them(tmp_path, monkeypatch, capsys):
    from megatron_bvpo.cli import bvpo

    monkeypatch.chdir(tmp_path)
    entries = [
        row(**SHORT, **EXPERT, accept_rate=0.5),
        {**PROMPT, **EXPERT, "accept_rate": 0.0},
        {**SINGLE, "label": 0},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def rows(*options):
        code = bvpo(["rows", "a.jsonl", *options])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    code, said, _ = rows("--bvpo_streams", "trace", "short", "expert", "--out", "one.jsonl")
    assert code == 0
    assert said[1:3] == [
        "3 rows read, 2 kept.",
        "1 trace pair, 0 empty pairs (0 with their own answers, 0 with stripped answers), 1 short pair, "
        "2 demonstrations.",
    ]
    assert [json.loads(line) for line in (tmp_path / "one.jsonl").open()] == entries[:2]
    gated = rows("--bvpo_streams", "trace", "expert", "--bvpo_gate", "hpt")[1]
    assert "Switched off by the gate: 1 demonstration." in gated
    none = rows("--bvpo_streams", "trace", "expert", "--bvpo_gate", "hpt", "--bvpo_gate_threshold", "0.5")[1]
    assert "Switched off by the gate: 1 trace pair." in none
    assert "1 trace response (0 right, 1 wrong)" in rows("--loss_type", "kto", "--bvpo_empty", "own")[1][2]
    for wrong in ("x", "1", "-1", "nan"):
        code, _, err = rows("--bvpo_streams", "trace", "expert", "--bvpo_gate", "hpt", "--bvpo_gate_threshold", wrong)
        assert code == 2 and "--bvpo_gate_threshold: is" in err and len(err.splitlines()) == 1
    code, _, err = rows("--bvpo_streams", "tracer")
    assert code == 2 and "tracer" in err and len(err.splitlines()) == 1


# --- any row ---

WORDS = st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", "b", " "]), max_size=5).map("".join)
CELL = st.none() | WORDS | st.sampled_from([CHOSEN, REJECTED, "4", 4, True, 0.5, "true", [], {}])
NAMES = (*OWN, *SHORT, *EXPERT, "label", "empty_label", "accept_rate")
ROWS = st.builds(
    lambda base, more: {**base, **more},
    st.sampled_from([row(), PROMPT, SINGLE, row(rejected="x"), {}]),
    st.dictionaries(st.sampled_from(NAMES), CELL),
)
RULE_SETS = st.builds(
    RowRules,
    empty=st.sampled_from(["strip", "require", "own"]),
    streams=st.sets(st.sampled_from([s for s in ORDER if s != "short"]), min_size=1).map(lambda s: tuple(sorted(s))),
    unpaired=st.booleans(),
    gate_threshold=st.none() | st.sampled_from([0.0, 0.5]),
) | st.builds(
    RowRules,
    streams=st.sets(st.sampled_from(ORDER), min_size=1).map(lambda s: tuple(sorted(s))),
    gate_threshold=st.none() | st.just(0.0),
)


@given(ROWS, RULE_SETS)
@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.too_slow])
def test_a_row_is_used_or_named(entry, rules):
    new, verdict = Reading(rules).canonical(entry)
    assert verdict.kept or verdict.problems
    assert set(verdict.streams) <= set(rules.streams) and verdict.empty_ok == (verdict.empty_source is not None)
    assert list(verdict.streams) == [s for s in ORDER if s in verdict.streams]
    assert all(problem.drops == "row" or problem.drops in rules.streams for problem in verdict.problems)
    assert not set(verdict.lost) & set(verdict.streams) and not set(verdict.gated) & set(verdict.streams)
    assert RowVerdict.from_json(verdict.to_json()) == verdict
    tally = RowTally()
    tally.add(verdict)
    assert RowTally.from_dict(json.loads(json.dumps(vars(tally)))) == tally and tally.lines()
    if not verdict.kept:
        return
    if not any(problem.structural for problem in verdict.problems):  # those stop a run
        assert check_row(new, rules).streams == verdict.streams, "what is handed over is judged as the row was"
    normal = normalise_row(new, verdict, rules)
    assert normalise_row(normal, verdict, rules) == normal
    texts = {"trace": ("rejected_response",), "empty": tuple(OWN), "short": tuple(SHORT), "expert": tuple(EXPERT)}
    for stream in verdict.streams:
        single = rules.unpaired and stream != "expert"
        for name in texts[stream][: 1 if single else 2]:
            assert isinstance(normal[name], str)
            assert normal[name] or (single and stream == "trace")
    assert normal["messages"][-1]["role"] == "assistant" and normal["messages"][-1]["content"]
    assert normal["rejected_response"] != normal["messages"][-1]["content"]
