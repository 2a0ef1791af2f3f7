"""Mistakes in data files, through the command line: one clear message, exit code 2, no stack trace.

The launching process finds them, before a rank is started. Rows that can be left out are counted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bvpo.rehearsal.sample_data import make_sample_rows
from tests.distributed.cells import ROOT
from tests.distributed.forks import zygotes
from tests.distributed.short_runs import BAD, GOOD, assert_told, flags, jsonl, row

pytestmark = pytest.mark.slow


# --- data files: told by the launching process ---

# case: (file name, content, message after the file's path)
FILES = {
    "broken JSON": (
        "a.jsonl",
        jsonl(*[row()] * 16) + b'{"messages": [\n',
        r":17: broken JSON at column \d+: .* Write .*",
    ),
    "no UTF-8": (
        "a.jsonl",
        jsonl(row()) + b'{"messages": "\xff"}\n',
        ":2: expected UTF-8, found the byte 0xff .* Save .*",
    ),
    "UTF-16": ("a.jsonl", json.dumps(row()).encode("utf-16"), ": expected UTF-8, found a UTF-16 .*"),
    "an empty file": ("a.jsonl", b"", ": the file is empty. Check .*"),
    "only white space": ("a.jsonl", b"\n \n", ": the file is empty. Check .*"),
    "an empty list": ("a.json", b"[]", ": the file holds no rows. Check .*"),
    "a row that is a list": ("a.jsonl", jsonl(row()) + b"[1]\n", ":2: expected an object, found a list. Every row .*"),
    "messages are text": (
        "a.jsonl",
        jsonl(row() | {"messages": "What?"}),
        ":1: messages: expected a list of messages, found text 'What.'. .*",
    ),
    "a message is text": (
        "a.jsonl",
        jsonl(row() | {"messages": ["What?"]}),
        r":1: messages\[0\]: expected an object.*",
    ),
    "content is a number": (
        "a.jsonl",
        jsonl(row(), row(chosen=4)),
        r":2: messages\[1\].content: expected text, found .* 4.*",
    ),
    "rejected is a number": (
        "a.jsonl",
        jsonl(row(rejected=5)),
        ":1: rejected_response: expected text or .* the number 5.*",
    ),
    "an empty answer is a list": (
        "a.jsonl",
        jsonl(row(empty_response=["4"], empty_rejected_response="5")),
        ":1: empty_response: expected text, found a list.*",
    ),
    "a key twice": (
        "a.jsonl",
        b'{"messages": [], "messages": []}\n',
        ":1: broken JSON: the key 'messages' stands twice.*",
    ),
    "several rejected responses": (
        "a.jsonl",
        jsonl(row(), row(rejected=[BAD, "<think>\nHm.\n</think>\n\n6"])),
        ":2: rejected_response: several responses in one list, found 2. .* write a row for each.*",
    ),
    "columns of other names": (
        "a.jsonl",
        jsonl({"dialogue": row()["messages"], "worse": BAD}),
        """: columns: no messages .*, found dialogue, worse. .* --columns '{"dialogue": "messages", "worse": .*""",
    ),
    "CSV of something else": (
        "a.csv",
        b"a,b\n1,2\n",
        ":1: columns: no messages and no pair of responses, found a, b. .*",
    ),
    "CSV with a cell too many": (
        "a.csv",
        b"query,response,rejected_response\na,b,c,d\n",
        ":2: expected 3 cells .* 4. .*",
    ),
    "an unknown ending": ("a.jsonx", jsonl(row()), ": ms-swift reads files by the ending .*'.jsonx'. Give .*"),
    "nothing left": ("a.jsonl", jsonl(row(chosen="4"), row(rejected=...)), ": no row is left .* 2 read.* Mend .*"),
}


@pytest.mark.parametrize("case", FILES)
def test_data_file(case, workshop, tmp_path):
    name, content, message = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=file), launcher=True)
    assert_told(run, re.escape(str(file)) + message)
    assert "torch.distributed.run" not in run.text, "ranks were started"


def test_data_file_that_is_not_there(workshop, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(row()))
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=tmp_path / "pears.jsonl"), launcher=True)
    assert_told(run, rf".*pears.jsonl: no such file. Did you mean {tmp_path}/pairs.jsonl\? .*")


# --- rows that can be left out ---

LONG = "Hm. " * 400


# What is wrong, and how it is counted in the log.
ROWS = {
    "no rejected side": (row(rejected=...), "1 × rejected_response: missing"),
    "no messages": (row() | {"messages": []}, "1 × messages: empty"),
    "no trace": (row(chosen="4", rejected="5"), "× messages: no trace, neither <think> nor </think>"),
    "an unclosed trace": (row(chosen="<think>\nTwo and"), "1 × messages: no </think>"),
    "equal responses": (row(rejected=GOOD), "1 × rejected_response: the same text as the chosen response"),
    "white space": (row(chosen=" \n "), "1 × messages: blank response"),
    "images": (row(images=["a.png"]), "1 × images: not empty"),
    "tool calls": (
        row() | {"messages": [{"role": "user", "content": "?"}, {"role": "tool_call", "content": "{}"}]},
        "1 × messages: tool calls in the response",
    ),
    "equal empty answers": (
        row(empty_response="4", empty_rejected_response="4"),
        "1 × empty_rejected_response: the same text as empty_response",
    ),
    "one empty answer": (
        row(empty_response="4"),
        "1 × empty_rejected_response: missing, the other empty answer is there",
    ),
}
TOO_LONG = {
    "rows dropped": row(prompt=f"Read long. {LONG}"),
    "rows kept without the trace pair": row(chosen=f"<think>\n{LONG}\n</think>\n\n4", prompt="Think long."),
    "rows kept without the empty pair": row(empty_response=LONG, empty_rejected_response="5", prompt="Answer long."),
}


def test_rows_that_are_left_out_are_counted_and_listed(workshop, tmp_path):
    good = make_sample_rows(6, seed=1)
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(jsonl(*good, *(bad for bad, _ in ROWS.values()), *TOO_LONG.values()))
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=file, save_safetensors="false")).require_success()
    said = re.sub(r"\[INFO:swift\] ", "", run.stderr[0])
    for number, (what, (_, counted)) in enumerate(ROWS.items()):
        assert counted in said, what
        assert f"{file}:{len(good) + number + 1}: " in said, f"{what} is not listed"
    kept = len(good) + 5  # two without their empty pair, and three with something that is too long to be encoded
    assert f"{len(good) + len(ROWS) + len(TOO_LONG)} rows read, {kept} kept." in said
    for what in TOO_LONG:
        assert f"training data: 1 {what}: longer than --max_length 512" in said
    too_long = r"longer than --max_length 512 \(\d+ tokens\): raise it, or cut with --truncation_strategy"
    place = rf"training data: {re.escape(str(file))}:\d+: row \d+"
    assert re.search(rf"{place} \('Read long. Hm.*…'\): its trace pair: {too_long}; its empty pair: {too_long}", said)
    assert re.search(rf"{place} \('Think long.'\): its trace pair: longer than", said)
    assert re.search(rf"{place} \('Answer long.'\): its empty pair: longer than", said)
    assert f"training data: trace stream: {kept} pairs encoded, {kept - 2} left and 2 lost." in said
    assert re.search(rf"trace stream: {kept - 2} pairs,", said) and re.search(rf"empty stream: {kept - 4} pairs,", said)


def test_pairs_that_are_cut_are_counted(workshop, tmp_path):
    """Cut on the right: what is left without a response or a difference is lost by name, and the rest is trained."""
    good = make_sample_rows(4, seed=1)
    behind = f"<think>\n{LONG}\n</think>\n\n"
    rows = [
        row(prompt=f"Read long. {LONG}"),
        row(f"{behind}4", f"{behind}5", prompt="Differ late."),
        row(f"<think>\nSo {LONG}</think>4", f"<think>\nOr {LONG}</think>5", prompt="Differ at once."),
    ]
    file = tmp_path / "long.jsonl"
    file.write_bytes(jsonl(*good, *rows))
    more = {"truncation_strategy": "right", "global_batch_size": 6, "save_safetensors": "false"}
    run = zygotes().run(tmp_path / "out", flags(workshop, dataset=file, **more)).require_success()
    said = re.sub(r"\[INFO:swift\] ", "", run.stderr[0])
    for line in (
        "trace stream: 1 pairs cut to --max_length.",
        "trace stream: 7 pairs encoded, 5 left and 2 lost.",
        "empty stream: 7 pairs encoded, 6 left and 1 lost.",
        "1 rows dropped: no response within --max_length 512",
        "1 rows kept without the trace pair: the same tokens on both sides within --max_length 512",
    ):
        assert f"training data: {line}" in said, line
    assert re.search("trace stream: 5 pairs,", said) and re.search("empty stream: 6 pairs,", said)
    assert len(step_losses(tmp_path / "out")) == 1


def step_losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "logging.jsonl").read_text().splitlines())
    return [line["loss/trace"] for line in lines if "loss/trace" in line]


# --- the commands themselves ---


def command(workshop, tmp_path, **given) -> subprocess.CompletedProcess:
    env = {**os.environ, "BVPO_REHEARSAL": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "megatron_bvpo.cli", "rlhf", "--rlhf_type", "bvpo", *flags(workshop, **given)]
    argv += ["--output_dir", str(tmp_path / "out")]
    return subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_a_broken_line_is_told_before_anything_is_started(workshop, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[row()] * 16) + b'{"messages": [\n')
    result = command(workshop, tmp_path, dataset="a.jsonl")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(
        "megatron-bvpo: error: a.jsonl:17: broken JSON"
    )
    assert "torch.distributed.run" not in result.stdout and not (tmp_path / "out").exists()


def test_what_only_the_ranks_can_see_is_told_once_and_last(workshop, tmp_path):
    result = command(
        workshop,
        tmp_path,
        pipeline_model_parallel_size=2,
        model=workshop.dense,
        model_type="qwen3",
        expert_model_parallel_size=2,
    )
    assert result.returncode == 2
    told = [line for line in result.stderr.splitlines() if "megatron-bvpo: error:" in line]
    assert len(told) == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == told[0]
