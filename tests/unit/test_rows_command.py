"""`bvpo rows FILE …`: any rows judged as a run judges them, and brought to one form, without ms-swift."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.data.rows import check_row
from tests.unit.sample_rows import CHOSEN, OWN, REJECTED, RULES, row, talk

USER, GOOD, BAD = talk()[0], talk()[1], talk(REJECTED)[1]
# As the public data sets have them; each is the row below, or that with a system message.
PUBLIC = {
    "ms-swift": row(),
    "TRL, conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0, "score_rejected": 2.0},
    "TRL, a prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "UltraFeedback, binarised": {
        "prompt": USER["content"],
        "prompt_id": "f00",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "messages": [USER, GOOD],
        "score_chosen": 8.5,
    },
    "argilla, ratings": {
        "source": "evol",
        "prompt": USER["content"],
        "chosen": [USER, GOOD],
        "chosen-rating": 5.0,
        "rejected": [USER, BAD],
        "rejected-model": "m",
    },
    "argilla, texts": {"system": "", "input": USER["content"], "chosen": CHOSEN, "rejected": REJECTED, "order": ["a"]},
    "distilabel": {"instruction": USER["content"], "generations": [REJECTED, CHOSEN], "ratings": [1.0, 5.0]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": CHOSEN},
        "rejected": {"from": "gpt", "value": REJECTED},
    },
    "NeMo-RL": {
        "context": [USER],
        "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}],
    },
}


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    """Runs the command in the test's folder: (exit code, what it said, its error)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = bvpo(["rows", *map(str, argv)])
        said = capsys.readouterr()
        return code, said.out, said.err.strip()

    return run


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("form", PUBLIC)
def test_public_forms_come_out_in_one(form, rows, tmp_path):
    write(tmp_path / "a.jsonl", PUBLIC[form])
    code, said, err = rows("a.jsonl", "--out", "one.jsonl")
    assert code == 0, err
    (made,) = map(json.loads, (tmp_path / "one.jsonl").open())
    assert made.pop("prompt_id", "f00") == "f00"
    assert made == {"messages": [USER, GOOD], "rejected_response": REJECTED}
    assert check_row(made, RULES).trace_ok and "one.jsonl: 1 rows in one form." in said


def test_files_and_folders_and_what_is_lost(rows, tmp_path):
    (tmp_path / "data").mkdir()
    alone = {"messages": [USER], **OWN, "accept_rate": 0.5, "numbers": {"empty": [0, 3]}, "note": "left out"}
    write(tmp_path / "data" / "a.jsonl", row(**OWN), row(rejected=CHOSEN), alone)
    pq.write_table(pa.Table.from_pylist([row()]), tmp_path / "data" / "b.parquet")
    (tmp_path / "c.csv").write_text("question,chosen,rejected\nWhat?,<think>a</think>4,<think>b</think>5\n")
    code, said, _ = rows("data", "c.csv", "data/a.jsonl")
    assert code == 0 and said.splitlines() == [
        "data/a.jsonl: 3 rows",
        "data/b.parquet: 1 row",
        "c.csv: 1 row",
        "5 rows read, 4 kept.",
        "3 trace pairs, 4 empty pairs (2 with their own answers, 2 with stripped answers).",
        "1 row with an empty pair alone.",
        "1 row dropped:",
        "  1 × rejected_response: the same text as the chosen response",
        "empty stream: of 4 rows 50 % have own answers, 50 % have stripped ones, 0 % have none. A stripped answer was "
        "written behind a trace: another distribution than the paper's, whose answers without a trace were generated "
        "and ranked for themselves.",
        "data/a.jsonl:2: rejected_response: the same text as the chosen response "
        "(leave the row out: it prefers nothing)",
    ]
    assert rows("data", "c.csv", "--out", "one.jsonl")[0] == 0
    made = [json.loads(line) for line in (tmp_path / "one.jsonl").open()]
    assert made[1] == {name: alone[name] for name in alone if name != "note"}
    assert rows("one.jsonl")[1].splitlines()[1:4] == [
        "4 rows read, 4 kept.",
        "3 trace pairs, 4 empty pairs (2 with their own answers, 2 with stripped answers).",
        "1 row with an empty pair alone.",
    ]


def test_what_a_run_would_ask_of_them(rows, tmp_path):
    write(tmp_path / "a.jsonl", row(), {"messages": [USER], **OWN})
    assert "2 rows read, 1 kept." in rows("a.jsonl", "--bvpo_empty", "require")[1]
    told = "1 × empty_response: an empty pair alone, and no empty stream is run"
    assert told in rows("a.jsonl", "--bvpo_alpha", "1")[1]
    assert "1 × messages:" not in rows("a.jsonl", "--bvpo_alpha", "0")[1]
    write(tmp_path / "b.jsonl", {"ask": "What?", "up": CHOSEN, "down": REJECTED})
    code, _, err = rows("b.jsonl")
    assert code == 2 and "--columns" in err
    columns = json.dumps({"ask": "query", "up": "response", "down": "rejected_response"})
    assert rows("b.jsonl", "--columns", columns)[0] == 0


def test_it_loads_neither_ms_swift_nor_torch(tmp_path):
    write(tmp_path / "a.jsonl", row())
    code = (
        "import sys; from megatron_bvpo.cli import bvpo; assert bvpo(['rows', 'a.jsonl', '--out', 'b.jsonl']) == 0; "
        "print(sorted({'swift', 'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


BAD_INPUT = {
    "no file": (lambda p: None, ["a.jsonl"], "a.jsonl: no such file"),
    "near": (lambda p: write(p / "ab.jsonl", row()), ["a.jsonl"], "a.jsonl: no such file. Did you mean ab.jsonl?"),
    "no data file": (lambda p: (p / "a.pdf").write_text("x"), ["a.pdf"], "a.pdf: is no data file by its name"),
    "an empty folder": (lambda p: (p / "d").mkdir(), ["d"], "d: no data file in this folder"),
    "samples": (
        lambda p: ((p / "d").mkdir(), (p / "d" / "prompts.parquet").write_bytes(b"")),
        ["d"],
        "d: is a folder of samples, not of rows; make rows of it: bvpo pairs d --out pairs.jsonl",
    ),
    "an empty file": (lambda p: (p / "a.jsonl").write_text(""), ["a.jsonl"], "a.jsonl: the file is empty"),
    "broken": (lambda p: (p / "a.jsonl").write_text("{"), ["a.jsonl"], "a.jsonl:1: broken JSON"),
    "a broken table": (lambda p: (p / "a.parquet").write_bytes(b"x" * 99), ["a.parquet"], "a.parquet: cannot be read"),
    "wrong type": (
        lambda p: write(p / "a.jsonl", row(), row() | {"messages": 3}),
        ["a.jsonl"],
        "a.jsonl:2: messages: expected a list",
    ),
    "nothing left": (lambda p: write(p / "a.jsonl", row(rejected=CHOSEN)), ["a.jsonl"], "a.jsonl: no row is left"),
    "unknown columns": (lambda p: write(p / "a.jsonl", {"a": 1}), ["a.jsonl"], "a.jsonl: columns: no messages"),
    "an unknown option": (lambda p: write(p / "a.jsonl", row()), ["a.jsonl", "--seed", "1"], "bvpo rows FILE: unrec"),
    "an alpha": (lambda p: write(p / "a.jsonl", row()), ["a.jsonl", "--bvpo_alpha", "2"], "--bvpo_alpha: alpha is"),
    "an empty rule": (lambda p: write(p / "a.jsonl", row()), ["a.jsonl", "--bvpo_empty", "x"], "--bvpo_empty: expec"),
    "columns": (lambda p: write(p / "a.jsonl", row()), ["a.jsonl", "--columns", "x"], "--columns: expected a JSON"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_once_and_nothing_is_written(case, rows, tmp_path):
    prepare, argv, told = BAD_INPUT[case]
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, said, err = rows(*argv, "--out", "one.jsonl")
    assert code == 2 and not said and len(err.splitlines()) == 1
    assert err.startswith(f"megatron-bvpo: error: {told}"), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["a.jsonl", "d", "one.parquet", "no/one.jsonl"])
def test_an_output_that_cannot_be(out, rows, tmp_path):
    file = write(tmp_path / "a.jsonl", row())
    (tmp_path / "d").mkdir()
    code, _, err = rows("a.jsonl", "--out", out)
    assert code == 2 and "--out: " in err and json.loads(file.read_text()) == row()


def test_a_json_file_is_rows_unless_it_names_data(rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row()]))
    (tmp_path / "run.json").write_text(json.dumps({"model": "m", "dataset": ["rows.json"]}))
    for given in ("rows.json", "run.json"):
        code, said, _ = rows(given)
        assert code == 0 and "1 row read, 1 kept." in said
