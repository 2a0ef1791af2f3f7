"""`bvpo sample`, whatever stops it and however often: nothing is lost, and nothing asked twice."""

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.asking import journal, run_settings
from megatron_bvpo.sampling.pairing.pairing import PairRules
from megatron_bvpo.sampling.pairing.pairs_run import PairsPlan, make_pairs
from megatron_bvpo.sampling.pairing.sample_facts import Folder
from megatron_bvpo.sampling.samples import Sample, read_journal, read_judgements, read_samples
from tests.unit.openai_server import Served, ServerProcess
from tests.unit.sample_runs import HYBRID, keys, rows, sample, write_prompts


def test_engines_logs_are_no_other_files(prompts, tmp_path):
    """launch/sample.sbatch makes them before the first answer."""
    (tmp_path / "out" / "logs" / "slurm-7-0").mkdir(parents=True)
    with Served() as server:
        assert sample(prompts, tmp_path / "out", server) == 0


def test_more_samples_and_modes_are_added(prompts, tmp_path):
    out = tmp_path / "out"
    with Served() as server:
        sample(prompts, out, server, samples=1, flags=(*HYBRID, "--modes", "thinking"))
        before = rows(out)
        sample(prompts, out, server, samples=3)
        assert set(keys(server).values()) == {1} and len(server.requests) == 36
    after = rows(out)
    assert {key: after[key] for key in before} == before and len(after) == 36
    assert run_settings.read(out)["samples"] == 3


def test_a_reader_beside_a_running_sampler_misses_nothing(tmp_path):
    """Journals become shards while they are read."""
    made = [Sample("p", "empty", number, "y") for number in range(6)]
    (tmp_path / "journal").mkdir()
    paths = [tmp_path / "journal" / f"00000{i}.jsonl" for i in (1, 2, 3)]
    for path, some in zip(paths, (made[:2], made[2:4], made[4:]), strict=True):
        path.write_text("".join(s.to_json() + "\n" for s in some))
    reader = read_samples(tmp_path)
    found = [next(reader)]
    for path in paths:
        journal.compact(path)
    found += reader
    assert sorted(found, key=lambda s: s.number) == made


def test_a_stop_between_shard_and_journal_counts_once(prompts, tmp_path):
    out = tmp_path / "out"
    with Served() as server:
        sample(prompts, out, server)
        found = rows(out)
        shard = next((out / "samples").glob("*.parquet"))
        lines = "".join(s.to_json() + "\n" for s in read_samples(out))
        (out / "journal" / f"{shard.stem}.jsonl").write_text(lines)
        (out / "samples" / ".000009.parquet.1").write_text("half a shard")
        assert len(rows(out)) == 48
        sample(prompts, out, server)
        assert len(server.requests) == 48
    assert rows(out) == found and not list((out / "journal").iterdir())
    assert [path.name for path in (out / "samples").iterdir()] == [shard.name]


def test_full_journals_become_shards_while_sampling(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_LINES", 7)
    with Served() as server:
        sample(prompts, tmp_path / "out", server, concurrency=1)
    shards = sorted((tmp_path / "out" / "samples").glob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in shards] == [7] * 6 + [6]
    assert len(rows(tmp_path / "out")) == 48


def test_a_line_is_with_the_kernel_before_the_loop_waits_again(prompts, tmp_path):
    """And counts only then."""
    told = []

    async def go():
        kept = journal.Journal(tmp_path, told.extend)
        for number in range(3):
            kept.add(Sample("p", "empty", number, "y"))
        assert not told
        await asyncio.sleep(0)
        (path,) = (tmp_path / "journal").iterdir()
        assert list(read_journal(path)) == told == [Sample("p", "empty", number, "y") for number in range(3)]
        await kept.close()

    asyncio.run(go())
    assert list(read_samples(tmp_path)) == told


def test_a_full_disk_loses_nothing_that_was_told(prompts, tmp_path, monkeypatch, capsys):
    """The write that fails leaves half a line; nothing is written behind it."""
    real, room = os.write, [6000]

    def write(file, data):
        if len(data) > 2 and b"prompt_id" in data:
            if room[0] <= 0:
                raise OSError(28, "No space left on device")
            data = data[: room[0]]
            room[0] -= len(data)
        return real(file, data)

    with Served() as server:
        monkeypatch.setattr(os, "write", write)
        assert sample(prompts, tmp_path / "out", server, concurrency=2) == 2
        monkeypatch.undo()
        assert "No space left on device; make room" in capsys.readouterr().err
        have = rows(tmp_path / "out")
        assert 5 < len(have) < 48
        asked = keys(server)
        assert sample(prompts, tmp_path / "out", server, concurrency=2) == 0
        again = keys(server) - asked
        assert not {s.seed for s in have.values()} & again.keys() or len(rows(tmp_path / "out")) == 48
    assert len(rows(tmp_path / "out")) == 48


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number, tmp_path):
    out, prompts = tmp_path / "out", write_prompts(tmp_path / "prompts.jsonl", 200)
    with Served(delay=0.01) as server:
        process = spawn(prompts, out, server)
        wait_for(lambda: any(read_lines(out)))
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode == 128 + number
        have = rows(out)
        assert 0 < len(have) < 1600 and not list((out / "journal").iterdir())
        assert len(server.requests) - len(have) <= 8


def test_a_signal_does_not_wait_for_the_judge(tmp_path):
    out, prompts = tmp_path / "out", write_prompts(tmp_path / "prompts.jsonl", 3)
    with Served() as server:
        judge = ("--judge", "tests.unit.sample_judges:slow", "--judge_time_limit", "90", "--judge_workers", "1")
        process = spawn(prompts, out, server, more=judge)
        wait_for(lambda: len(read_lines(out)) == 24)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        process.join(55)
        assert process.exitcode == 128 + signal.SIGTERM
    assert len(rows(out)) == 24 and not list((out / "journal").iterdir())


def read_lines(out):
    return [line for path in (out / "journal").glob("*.jsonl") for line in read_journal(path)]


def wait_for(true, seconds=240):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "aiohttp",
        "pyarrow.parquet",
        "megatron_bvpo.sampling.asking.sampling_run",
        "megatron_bvpo.sampling.judging.judge_command",
    ]
)


def spawn(prompts, out, *servers, more=()):
    """`bvpo sample` in a process of its own, started without the second that imports take."""
    command = ["sample", str(prompts), "--out", str(out), "--model", "m", "--max_tokens", "100", "--samples", "4"]
    command += ["--concurrency", "8", "--server", *(s.address for s in servers), *HYBRID, *more]
    process = CONTEXT.Process(target=run_quietly, args=(command,))
    process.start()
    return process


def lines_of(logs) -> int:
    return sum(log.read_bytes().count(b"\n") for log in logs)


def run_quietly(command):
    sys.stderr = open(os.devnull, "w")
    sys.exit(bvpo(command))


def test_killed_at_random_moments_and_with_a_server_that_dies(tmp_path, request):
    """Done-when 2: complete, nothing that arrived is asked again, samples and pairs of an undisturbed run."""
    kills = 60 if request.config.getoption("--whole-matrix") else 20
    prompts = write_prompts(tmp_path / "prompts.jsonl", 8 * kills)
    judge = ("--judge", "exact")
    with Served() as server:
        sample(prompts, tmp_path / "calm", server)
    chance = random.Random(time.time_ns())
    out, logs = tmp_path / "out", [tmp_path / "one.log", tmp_path / "two.log"]
    one, two = (ServerProcess(log, delay=0.03, faults={"500": 0.02, "drop": 0.02}) for log in logs)
    killed, repeated, before = 0, 0, set()
    with one, two:
        while True:
            have = {s.seed for s in read_samples(out)} if out.is_dir() else set()
            lengths = [len(log.read_text().splitlines()) for log in logs]
            process = spawn(prompts, out, one, two, more=judge)
            if killed < kills and chance.random() < 0.2:
                process.join(chance.random() * 0.3)  # somewhere in its start
            elif killed < kills:
                enough = sum(lengths) + chance.randrange(1, 80)
                while lines_of(logs) < enough and process.exitcode is None:
                    time.sleep(0.005)
                process.join(chance.random() * 0.05)
            else:
                process.join()
            if process.exitcode is None:
                process.kill()
                process.join()
                killed += 1
            lines = [line for log, n in zip(logs, lengths, strict=True) for line in log.read_text().splitlines()[n:]]
            asked = {int(line.split()[1]) for line in lines}
            assert not have & asked
            repeated += len(asked & before)
            before |= asked
            if killed == kills // 3:
                two.kill()
            if killed == kills // 2 and two.process is None:
                two.start()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
    assert killed == kills
    assert rows(out) == rows(tmp_path / "calm")
    assert {j.key for j in read_judgements(out, "exact")} == rows(out).keys()
    assert repeated <= 8 * kills  # what was in flight
    assert bvpo(["judge", str(tmp_path / "calm"), "--with", "exact"]) == 0
    for rules in (PairRules(), PairRules(rejected="likely", most=2, match_length=True)):
        found, calm = (pairs_of(folder, rules) for folder in (out, tmp_path / "calm"))
        assert found == calm and found.count(b"rejected_response") > 8 * kills  # of two modes, most prompts have a pair


def pairs_of(folder: Path, rules: PairRules) -> bytes:
    """The file that `bvpo pairs` writes."""
    file = folder.with_suffix(".jsonl")
    make_pairs(PairsPlan((Folder("s", folder),), {"pairs": file}, rules=rules))
    return file.read_bytes()
