"""What the launching process reads from the arguments, before any rank parses them."""

from __future__ import annotations

import json

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import argv as flags
from megatron_bvpo.launching import error_output, start_checks

TRACED = {
    "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\na\n</think>\n\n4"}],
    "rejected_response": "<think>\nb\n</think>\n\n4",
}
TRACE_ONLY = "1 trace pair, 0 empty pairs (0 with their own answers, 0 with stripped answers)."


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("--dataset a b --lr 1", ["a", "b"]),
        ("--lr 1 --dataset a", ["a"]),
        ("--dataset=a", ["a"]),
        ("--dataset=a b", ["a"]),
        ("--dataset a --lr 1 --dataset b c", ["b", "c"]),
        ("--dataset", []),
        ("--val_dataset a", []),
        ("--cached-dataset a --lr -1", []),
    ],
)
def test_flags_with_several_values(argv, values):
    assert flags.option_list(argv.split(), "dataset") == values


def test_both_spellings_of_a_list_flag():
    assert flags.option_list(["--val-dataset", "a", "b"], "val_dataset") == ["a", "b"]


@pytest.fixture
def pairs(tmp_path):
    """Writes rows to a file; returns its name."""

    def write(*rows, name="pairs.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_the_scan_reads_all_files_and_reports(pairs):
    files = [pairs(TRACED, TRACED), pairs(TRACED, name="held_out.jsonl")]
    lines = start_checks.scan_data(["--dataset", files[0], "--val_dataset", files[1]])
    assert lines[:3] == [f"{files[0]}: 2 rows", f"{files[1]}: 1 row", "3 rows read, 3 kept."]
    with pytest.raises(UserError, match=r"nothing.jsonl: no such file"):
        start_checks.scan_data(["--dataset", files[0], f"--val_dataset={files[1]}.nothing.jsonl"])


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        ([], "1 trace pair, 0 empty pairs"),  # both answers are 4
        (["--bvpo_alpha", "1"], TRACE_ONLY),
        (["--bvpo_alpha", "auto"], "1 trace pair, 0 empty pairs"),
    ],
)
def test_the_scan_asks_what_the_run_asks(argv, kept, pairs):
    assert any(line.startswith(kept) for line in start_checks.scan_data(["--dataset", pairs(TRACED), *argv]))


@pytest.mark.parametrize("argv", [["--bvpo_alpha", "0"], ["--bvpo_empty", "require"]])
def test_data_that_leave_nothing_for_the_run_are_refused(argv, pairs):
    with pytest.raises(UserError, match="no row is left to train on: 1 read, all dropped"):
        start_checks.scan_data(["--dataset", pairs(TRACED), *argv])


def test_columns_of_the_user_are_mapped(pairs):
    renamed = {"talk": TRACED["messages"], "bad": TRACED["rejected_response"]}
    argv = ["--dataset", pairs(renamed), "--columns", '{"talk": "messages", "bad": "rejected_response"}']
    assert "1 row read, 1 kept." in start_checks.scan_data(argv)


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["--custom_register_path", "mine.py"], {}),
        (["--custom_dataset_info", "mine.json"], {}),
        (["--external_plugins", "mine.py"], {}),
        (["--bvpo_alpha", "half"], {}),
        (["--help"], {}),
        ([], {"NODE_RANK": "1"}),
    ],
)
def test_what_only_ms_swift_can_read_is_left_to_it(argv, env, pairs, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert start_checks.scan_data(["--dataset", pairs([1]), *argv]) is None


def test_a_hub_name_is_not_looked_up(pairs):
    lines = start_checks.scan_data(["--dataset", "owner/pairs"])
    assert lines == ["owner/pairs: not a local file; its rows are checked after loading."]
    assert start_checks.scan_data([]) is None


def test_rows_are_judged_without_a_run(pairs, tmp_path, capsys):
    """`bvpo rows`: what the run's log will say, from the same YAML file and flags."""
    run = tmp_path / "run.yaml"
    run.write_text(f"rlhf_type: bvpo\nmodel: /not/looked/at\nbvpo_alpha: 1\ndataset: {pairs(TRACED, [1])}\n")
    assert bvpo(["rows", str(run)]) == 2
    assert "pairs.jsonl:2: expected an object, found a list" in capsys.readouterr().err
    assert bvpo(["rows", str(run), "--dataset", pairs(TRACED), "--bvpo_empty", "strip"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [f"{pairs(TRACED)}: 1 row", "1 row read, 1 kept.", TRACE_ONLY]
    assert bvpo(["rows", str(run), "--dataset", pairs(TRACED), "--bvpo_alpha", "0"]) == 2
    assert "no row is left to train on" in capsys.readouterr().err
    for given in (["--external_plugins", "mine.py"], ["--bvpo_alpha", "half"]):
        assert bvpo(["rows", str(run), "--dataset", pairs(TRACED), *given]) == 2
        assert "nothing can be judged ahead" in capsys.readouterr().err


def test_rank_0_gets_the_report(tmp_path, monkeypatch):
    monkeypatch.delenv(error_output.FOLDER, raising=False)
    assert error_output.handed_over_scan() is None
    monkeypatch.setenv(error_output.FOLDER, str(tmp_path))
    assert error_output.handed_over_scan() is None
    error_output.hand_over_scan(tmp_path, ["a.jsonl: 3 rows"])
    assert error_output.handed_over_scan() == ["a.jsonl: 3 rows"]
