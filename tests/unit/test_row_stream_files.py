"""Rows of the other streams from files, and any row under any rules."""

import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.handover import FileReport, Reading, handed_over, judged_rows
from megatron_bvpo.data.rows import (
    RowRules,
    RowTally,
    RowVerdict,
    check_row,
    normalise_row,
)
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import ORDER
from tests.unit.sample_rows import ALL, CHOSEN, EXPERT, GATE, KTO, OWN, PROMPT, REJECTED, SHORT, SINGLE, row, talk


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
