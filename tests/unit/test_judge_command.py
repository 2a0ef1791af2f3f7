"""`bvpo judge`: folders, going on, several judges, the summary, and users' mistakes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bvpo import cli
from megatron_bvpo.sampling.judging import judgement_folder
from megatron_bvpo.sampling.judging.judge_summary import wilson
from megatron_bvpo.sampling.samples import (
    JOURNAL,
    PROMPTS,
    SAMPLES,
    Judgement,
    Prompt,
    Sample,
    read_judgements,
    read_samples,
    write_shard,
)
from tests.unit.judge_server import JudgeServerInAThread

ROOT = Path(__file__).parents[2]
ODD = "tests.unit.odd_judges"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def a_folder(path, prompts=10, samples=4, answers=True, text=None):
    """`number` of sample 3 of each four is wrong; half of the samples are in a journal."""
    write_shard(
        path / PROMPTS,
        [
            Prompt(f"p{i}", [{"role": "user", "content": f"{i} + 1?"}], str(i + 1) if answers else None, f"f:{i}", {})
            for i in range(prompts)
        ],
        Prompt,
    )
    rows = []
    for i in range(prompts):
        for mode in ("thinking", "empty"):
            for number in range(samples):
                final = text or f"The answer is {i + 1 + (number % 4 == 3)}."
                trace = "<think>\nThe answer is 1.\n</think>\n\n" if mode == "thinking" else ""
                rows.append(Sample(f"p{i}", mode, number, trace + final))
    half = len(rows) // 2
    write_shard(path / SAMPLES / "000000.parquet", rows[:half], Sample)
    (path / JOURNAL).mkdir()
    lines = "".join(row.to_json() + "\n" for row in rows[half:])
    (path / JOURNAL / "1.jsonl").write_text(lines + '{"prompt_id": "p0", "mo')  # a kill cut the last line short
    return path


@pytest.fixture
def folder(tmp_path):
    return a_folder(tmp_path / "samples")


def judge(capsys, *argv):
    code = cli.bvpo(["judge", *map(str, argv)])
    return code, capsys.readouterr()


def test_the_table_and_the_files(folder, capsys):
    code, told = judge(capsys, folder, "--with", "exact")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in told.out.splitlines()}
    low, high = wilson(30, 40)
    assert rows["thinking"] == rows["empty"]
    assert rows["empty"][:5] == ["40", "30", "10", "0", "0"]
    assert rows["empty"][5:] == ["0.750", f"({low:.3f}", "to", f"{high:.3f})"]
    said = list(read_judgements(folder, "exact"))
    assert {one.key for one in said} == {sample.key for sample in read_samples(folder)}
    assert all(one.right is (one.number != 3) for one in said)
    assert json.loads((folder / "judgements/exact/settings.json").read_text()) == {
        "judge": "exact",
        "ignore_case": False,
        "text": "final",
    }


def test_wilsons_interval():
    assert wilson(30, 40) == pytest.approx((0.5981, 0.8581), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_what_is_judged_is_not_judged_again(folder, capsys):
    judge(capsys, folder, "--with", "exact")
    before = sorted((folder / "judgements/exact").glob("*.parquet"))
    judge(capsys, folder, "--with", "exact")
    assert sorted((folder / "judgements/exact").glob("*.parquet")) == before
    more = [Sample("p0", "empty", 4, "The answer is 1."), Sample("p0", "empty", 5, None, error="gone")]
    write_shard(folder / SAMPLES / "000001.parquet", more, Sample)
    code, told = judge(capsys, folder, "--with", "exact")
    assert ["empty", "42", "31", "10", "0", "1"] in [line.split()[:6] for line in told.out.splitlines()]
    assert "failed, 1 times: no text: the request failed" in told.out
    assert "e.g. prompt p0, empty, number 5" in told.out
    added = set((folder / "judgements/exact").glob("*.parquet")) - set(before)
    assert len(added) == 1


def test_judges_stand_side_by_side(folder, capsys):
    for spec, name in (("exact", "exact"), ("math", "math"), (f"{ODD}:contains", "mine")):
        assert judge(capsys, folder, "--with", spec, "--name", name, "--workers", 1)[0] == 0
    by_judge = [{one.key: one.right for one in read_judgements(folder, name)} for name in ("exact", "math", "mine")]
    assert by_judge[0] == by_judge[1] and len(by_judge[2]) == 80


def test_the_whole_text(folder, capsys):
    judge(capsys, folder, "--with", f"{ODD}:contains", "--text", "whole", "--workers", 1)
    said = {one.key: one for one in read_judgements(folder, "contains")}
    assert said["p0", "thinking", 3].right and "<think>" in said["p0", "thinking", 3].parsed  # its trace says 1


def test_failures_are_told_and_judged_once_more_where_asked_for(tmp_path, capsys):
    folder = a_folder(tmp_path / "samples", prompts=2, text="raise")
    code, told = judge(capsys, folder, "--with", f"{ODD}:misbehaving", "--workers", 1)
    assert code == 0
    assert "failed, 16 times: RuntimeError: two lines" in told.out
    assert told.out.count("e.g. prompt") == 3
    assert ["thinking", "8", "0", "0", "0", "8", "-"] in [line.split() for line in told.out.splitlines()]
    shards = len(list((folder / "judgements/misbehaving").glob("*.parquet")))
    judge(capsys, folder, "--with", f"{ODD}:misbehaving", "--workers", 1)
    assert len(list((folder / "judgements/misbehaving").glob("*.parquet"))) == shards
    judge(capsys, folder, "--with", f"{ODD}:misbehaving", "--workers", 1, "--again", "failed")
    assert len(list((folder / "judgements/misbehaving").glob("*.parquet"))) == shards + 1
    assert len(list(read_judgements(folder, "misbehaving"))) == 16


def test_an_unfinished_trace_is_wrong_and_unparsed(tmp_path, capsys):
    folder = a_folder(tmp_path / "samples", prompts=1)
    write_shard(folder / SAMPLES / "9.parquet", [Sample("p0", "thinking", 9, "<think>\nThe answer is 1")], Sample)
    code, told = judge(capsys, folder, "--with", "exact")
    assert ["thinking", "5", "3", "2", "1", "0"] in [line.split()[:6] for line in told.out.splitlines()]
    assert "unparsed: no final answer" in told.out


def test_scores_of_a_reward_have_a_table_of_their_own(folder, capsys):
    def answer(path, body):
        return 200, {"data": [{"probs": [len(body["messages"][-1]["content"])]}]}

    with JudgeServerInAThread(answer, [{"id": "rm", "owned_by": "vllm"}]) as server:
        code, told = judge(capsys, folder, "--with", f"reward:{server.url}")
    assert code == 0 and "scored" in told.out
    rows = [line.split() for line in told.out.splitlines() if line.startswith("empty")]
    assert rows[0][1:] == ["40", "0", "0", "0", "0", "-"]
    assert rows[1][:6] == ["empty", "40", "16", "16", "16", "16"] and len(rows[1]) == 8


def test_other_settings_are_refused_with_the_difference_and_taken_when_all_is_judged_anew(folder, capsys):
    judge(capsys, folder, "--with", "exact")
    code, told = judge(capsys, folder, "--with", "exact", "--ignore_case", "--text", "whole")
    assert code == 2
    assert "ignore_case False there and True now, text 'final' there and 'whole' now" in told.err
    assert told.err.count("\n") == 1
    assert judge(capsys, folder, "--with", "exact", "--ignore_case", "--again", "all")[0] == 0
    assert len(list(read_judgements(folder, "exact"))) == 80
    assert judge(capsys, folder, "--with", "exact", "--ignore_case")[0] == 0


def test_another_process_and_what_a_kill_left_behind(folder, capsys):
    settings = {"judge": "exact", "ignore_case": False, "text": "final"}
    with judgement_folder.JudgementFolder(folder, "exact", settings) as held:
        left = held.path / ".000000.parquet.4711"
        left.write_text("half")
        code, told = judge(capsys, folder, "--with", "exact")
        assert code == 2 and "another process judges as 'exact'" in told.err
        assert left.exists()
    assert judge(capsys, folder, "--with", "exact")[0] == 0
    assert not left.exists()


def test_killed_at_any_moment_it_goes_on(tmp_path):
    folder = a_folder(tmp_path / "samples", prompts=40, text="slow")
    code = (
        "import sys; from megatron_bvpo.sampling.judging import judgement_folder as f; f.SHARD_ROWS = 7\n"
        f"from megatron_bvpo import cli; sys.exit(cli.bvpo(['judge', {str(folder)!r}, '--with', '{ODD}:slow']))"
    )
    chance = random.Random(5)
    for stop in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 30
        shards = len(list(folder.glob("judgements/slow/*.parquet")))
        while len(list(folder.glob("judgements/slow/*.parquet"))) < shards + 2 and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(chance.random() / 10)
        process.send_signal(stop)
        assert process.wait() == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert len(list(folder.glob("judgements/slow/*.parquet"))) >= shards + 2
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    said = []
    for shard in sorted(folder.glob("judgements/slow/*.parquet")):
        import pyarrow.parquet as pq

        said += [Judgement(**row).key for row in pq.read_table(shard).to_pylist()]
    assert len(said) == len(set(said)) == 320


def _damaged(folder):
    (folder / JOURNAL / "0.jsonl").write_text("no JSON\n")


def _damaged_shard(folder):
    (folder / SAMPLES / "9.parquet").write_bytes(b"PAR1")


def _foreign(folder):
    write_shard(folder / SAMPLES / "9.parquet", [Sample("another", "empty", 0, "x")], Sample)


def _without_answers(folder):
    rows = [Prompt(f"p{i}", [{"role": "user", "content": "?"}], None, "f:1", {}) for i in range(10)]
    write_shard(folder / PROMPTS, rows, Prompt)


@pytest.mark.parametrize(
    "options, before, complaint",
    [
        (["--with", "maths"], None, "no judge 'maths'"),
        (["--with", "no_such_package:right"], None, "cannot import no_such_package"),
        (["--with", f"{ODD}:absent"], None, "has no absent"),
        (["--with", "reward:http://127.0.0.1:9"], None, "nobody answers at"),
        (["--with", "llm:somewhere"], None, "expected an address such as llm:"),
        (["--with", "llm:http://127.0.0.1:9", "--rubric", "/none"], None, "--rubric: cannot be read"),
        (["--with", "exact", "--name", "a/b"], None, "'a/b' cannot name a judge"),
        (["--with", "math", "--workers", "-2"], None, "--workers: must be 0 or more"),
        (["--with", "math", "--time_limit", "-1"], None, "--time_limit: must be 0 or more"),
        (["--with", "math", "--time_limit", "nan"], None, "--time_limit: must be 0 or more, found nan"),
        (["--with", "math", "--time_limit", "inf"], None, "--time_limit: must be a finite number"),
        (["--with", f"{ODD}:contains", "--threshold", "nan"], None, "--threshold: must be a finite number"),
        (["--with", "math"], _without_answers, "no prompt has an answer to compare with"),
        (["--with", "exact"], _damaged, "0.jsonl:1: a damaged line"),
        (["--with", "exact"], _damaged_shard, "9.parquet: cannot be read"),
        (["--with", "exact"], _foreign, "a sample of prompt 'another', which is not among the prompts"),
        (["--with", "exact"], lambda folder: (folder / PROMPTS).unlink(), "no folder of samples"),
        (["--with", "exact"], lambda folder: (folder / PROMPTS).write_text("x"), "prompts.parquet: cannot be read"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(folder, capsys, options, before, complaint):
    if before:
        before(folder)
    code, told = judge(capsys, folder, *options)
    assert code == 2
    assert told.err.startswith("megatron-bvpo: error: ") and told.err.count("\n") == 1
    assert complaint in told.err


def test_math_verify_may_be_missing(folder, capsys, monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    code, told = judge(capsys, folder, "--with", "math")
    assert code == 2 and "pip install 'megatron-bvpo[rehearsal]'" in told.err


def test_what_was_judged_before_the_server_went_is_kept(folder, capsys, monkeypatch):
    from megatron_bvpo.sampling.judging import judge_requests

    monkeypatch.setattr(judge_requests, "LONGEST_PAUSE_S", 0.01)
    answered = []

    def answer(path, body):
        answered.append(body)
        return (200, {"data": [{"probs": [1.0]}]}) if len(answered) <= 20 else (404, "gone")

    models = [{"id": "rm", "owned_by": "vllm"}]
    with JudgeServerInAThread(answer, models) as server:
        code, told = judge(capsys, folder, "--with", f"reward:{server.url}", "--concurrency", 1)
        assert code == 2 and "answers 404" in told.err
        assert len(list(read_judgements(folder, "reward"))) == 20
        answered[:] = []
    with JudgeServerInAThread(lambda path, body: (200, {"data": [{"probs": [1.0]}]}), models) as server:
        assert judge(capsys, folder, "--with", f"reward:{server.url}")[0] == 0  # another address is the same judge
        assert len(server.requests) == 60


def test_it_starts_quickly_and_loads_nothing_heavy():
    code = "import sys, megatron_bvpo.sampling.judging.judge_command; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = {"torch", "transformers", "numpy", "pyarrow", "aiohttp", "sympy", "math_verify", "tqdm", "asyncio"}
    assert not heavy & set(loaded.split())
