"""Files of prompts, the account of samples, and how far a run is."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bvpo.sampling.asking.account import Account
from megatron_bvpo.sampling.asking.progress import Progress
from megatron_bvpo.sampling.asking.prompts import PromptBook, read_prompt_files
from megatron_bvpo.sampling.samples import Prompt


def read(tmp_path, *rows, limit=None, name="p.jsonl"):
    path = tmp_path / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return read_prompt_files([str(path)], limit)


def test_rows_as_they_may_be_written(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    book, bad = read(
        tmp_path,
        {"prompt": "a", "answer": 3, "level": 2},
        {"prompt": [{"role": "user", "content": "b"}], "answer": ["x"], "prompt_id": 7},
        {"messages": talk, "answer": "y", "id": "n:1", "tools": None},
        {"messages": [{"from": "human", "value": "c"}]},
        {"prompt": "d", "system": "s"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "e"}]}]},
    )
    assert not bad.lines()
    assert [prompt.messages[-1]["content"] for prompt in book] == list("abacde")
    assert [prompt.answer for prompt in book] == ["3", '["x"]', "y", None, None, None]
    assert book[0].columns == {"level": 2} and book[0].source == f"{tmp_path}/p.jsonl:1"
    assert book.ids[1:3] == ["7", "n:1"] and len(book.ids[0]) == 16
    assert book[4].messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "d"}]
    assert [book.place[i] for i in book.ids] == list(range(6))


def test_what_is_no_prompt_is_named_and_counted(tmp_path):
    rows = [{"prompt": "a"}, {"n": 1}, "[1]\n", {"prompt": "a"}, {"prompt": "b", "id": 1}, {"prompt": "c", "id": 1}]
    book, bad = read(tmp_path, *rows, *[{"prompt": ""}] * 5, {"prompt": "b", "id": 1, "answer": "2"})
    assert [prompt.messages[0]["content"] for prompt in book] == ["a", "b"]
    lines = bad.lines()
    assert lines[0] == "9 rows are left out:" and "  and 4 more" in lines
    assert f"{tmp_path}/p.jsonl:2: no prompt" in lines[1] and "p.jsonl:3: expected an object, found list" in lines[2]
    assert f"p.jsonl:6: '1' stands at {tmp_path}/p.jsonl:5 with another prompt" in lines[3]
    assert lines[-1] == "1 row repeats a prompt that was read before, and is left out"


def test_several_files_a_limit_and_a_table(tmp_path):
    read(tmp_path, *({"prompt": f"{i}"} for i in range(3)), name="one.jsonl")
    table = pa.table({"prompt": ["x", "y"], "answer": [1, 2], "when": pa.array([0, 1], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "two.parquet")
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.parquet")]
    whole, _ = read_prompt_files(files)
    assert [p.messages[0]["content"] for p in whole] == ["0", "1", "2", "x", "y"]
    assert whole[4].answer == "2" and whole[4].columns == {"when": "1970-01-01 00:00:01"}
    some, _ = read_prompt_files(files, 4)
    assert some.ids == whole.ids[:4] and some.digest != whole.digest
    assert read_prompt_files(files)[0].digest == whole.digest


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["thinking", "empty"]), st.integers(0, 70)), max_size=60))
def test_the_account_is_a_set(asked):
    book = PromptBook()
    for i in range(5):
        book.add(Prompt(f"p{i}", [], None, "f:1", {}))
    account, known = Account(book), set()
    for index, mode, number in asked:
        assert account.has(index, mode, number) == ((index, mode, number) in known)
        assert account.add(f"p{index}", mode, number) == ((index, mode, number) not in known)
        known.add((index, mode, number))
    assert account.count == len(known)
    assert not account.add("other", "empty", 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(100, done=50, stream=stream)
    progress.verdicts(3, 4)
    progress.add(25, 500, failed=1)
    progress.say("a server is down")
    progress.close()
    shown = stream.getvalue()
    assert "75/100" in shown and "right 0.75, 1 failed" in shown and "a server is down\n" in shown
    assert progress.line().endswith("s left")


@pytest.mark.parametrize("every", [0.0, 60.0])
def test_progress_is_lines_elsewhere(every):
    stream = io.StringIO()
    progress = Progress(100, stream=stream, every=every)
    progress.add(25, 500)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == (1 if every == 0 else 0)
    assert not lines or lines[0].startswith("25 of 100 samples, ")
