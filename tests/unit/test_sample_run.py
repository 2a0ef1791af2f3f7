"""`bvpo sample` end to end: every sample once, whatever stops it and however often."""

import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.asking import journal, run_settings, sampling_run
from megatron_bvpo.sampling.asking.progress import Reasons
from megatron_bvpo.sampling.pairing.pairing import PairRules
from megatron_bvpo.sampling.pairing.pairs_run import PairsPlan, make_pairs
from megatron_bvpo.sampling.pairing.sample_facts import Folder
from megatron_bvpo.sampling.samples import (
    NO_TRACE_END,
    THINKS,
    TRUNCATED,
    Sample,
    read_journal,
    read_judgements,
    read_prompts,
    read_samples,
    write_shard,
)
from tests.unit.chat_models import write_chat_model
from tests.unit.openai_server import Served, ServerProcess, answer_of

HYBRID = ("--thinking_switch", "enable_thinking")


def write_prompts(path: Path, count: int, **more) -> Path:
    rows = [{"prompt": f"What is {i}?", "answer": f"{i % 3}", "family": "sum", **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl", 6)


def sample(prompts, out, *servers, flags=HYBRID, samples=4, concurrency=8):
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    command = ["sample", str(prompts), "--out", str(out), "--model", "m", "--max_tokens", "100"]
    command += ["--server", *addresses, "--samples", str(samples), "--concurrency", str(concurrency)]
    return bvpo([*command, *map(str, flags)])


def rows(folder) -> dict:
    """What is the same in every run."""
    found = list(read_samples(folder))
    assert len({s.key for s in found}) == len(found)
    return {s.key: s._replace(server=None, seconds=None) for s in found}


def keys(server) -> Counter:
    return Counter(request["seed"] for request in server.requests)


# --- one run ---


def test_every_sample_once(prompts, tmp_path, capsys):
    with Served() as one, Served(style="reasoning") as two:
        assert sample(prompts, tmp_path / "out", one, two) == 0
        requests = one.requests + two.requests
    found = rows(tmp_path / "out")
    asked = list(read_prompts(tmp_path / "out"))
    assert found.keys() == {(p.prompt_id, m, n) for p in asked for m in ("thinking", "empty") for n in range(4)}
    assert [(p.answer, p.source, p.columns) for p in asked][1] == ("1", f"{prompts}:2", {"family": "sum"})
    by_seed = {request["seed"]: request for request in requests}
    assert len(by_seed) == len(requests) == len(found)
    for (prompt_id, mode, _), answer in found.items():
        thinking = mode == "thinking"
        body = by_seed[answer.seed]
        assert body["messages"] == next(p.messages for p in asked if p.prompt_id == prompt_id)
        assert body["chat_template_kwargs"] == {"enable_thinking": thinking}
        trace, text = answer_of(body, thinking)
        assert answer.text == (f"<think>\n{trace}\n</think>\n\n{text}" if thinking else text)
        assert answer.tokens and answer.prompt_tokens and answer.marks == ()
        assert answer.logprob_sum == pytest.approx(-0.5 * answer.tokens)
    assert {s.server for s in read_samples(tmp_path / "out")} == {one.address, two.address}
    assert not list((tmp_path / "out" / "journal").iterdir())
    said = capsys.readouterr().err
    assert "6 prompts, modes thinking, empty: 48 samples, 0 are there" in said and "48 of 48 samples" in said


@pytest.mark.parametrize("style", ["raw", "opened", "closing", "reasoning", "reasoning_content", "r1"])
def test_texts_are_the_same_whatever_the_server_does_with_tags(style, prompts, tmp_path):
    with Served(style=style) as server:
        sample(prompts, tmp_path / "out", server, samples=1)
    with Served() as server:
        sample(prompts, tmp_path / "raw", server, samples=1)
    assert {k: s.text for k, s in rows(tmp_path / "out").items()} == {
        k: s.text for k, s in rows(tmp_path / "raw").items()
    }


@pytest.mark.parametrize("family", ["hybrid", "thinking", "r1"])
def test_three_modes(family, prompts, tmp_path):
    model = write_chat_model(tmp_path / "m", family)
    flags = ("--tokenizer", model, "--modes", "short", "thinking", "empty", "--short_budget", "5")
    with Served(style="closing") as server:
        assert sample(prompts, tmp_path / "out", server, samples=2, flags=flags) == 0
        paths = Counter(request["path"].removeprefix("/v1/") for request in server.requests)
    assert paths == ({"chat/completions": 24, "completions": 12} if family == "hybrid" else
                     {"chat/completions": 12, "completions": 24})  # fmt: skip
    found = rows(tmp_path / "out")
    assert Counter(key.mode for key in found) == {"thinking": 12, "empty": 12, "short": 12}
    for key, short in found.items():
        if key.mode == "short":
            start, _, answer = short.text.partition("\n</think>\n\n")
            assert found[key._replace(mode="thinking")].text.startswith(start) and start.startswith("<think>\nI")
            assert answer.startswith("The answer is")
    # A shard that is gone is asked for again; short samples then find their thinking samples on disk.
    shard = next((tmp_path / "out" / "samples").glob("*.parquet"))
    kept = [s for s in read_samples(tmp_path / "out") if s.mode != "short"]
    write_shard(shard, kept, Sample)
    with Served(style="raw") as server:
        sample(prompts, tmp_path / "out", server, samples=2, flags=flags)
        assert len(server.requests) == 12
    assert rows(tmp_path / "out") == found


def test_marks(prompts, tmp_path, capsys):
    with Served(finish="length", thinks_on=True) as server:
        sample(prompts, tmp_path / "out", server, samples=1)
    found = rows(tmp_path / "out")
    assert {s.finish_reason for s in found.values()} == {"length"}
    assert {s.marks for k, s in found.items() if k.mode == "empty"} == {(TRUNCATED, THINKS)}
    assert "empty: thinks: 6" in capsys.readouterr().err
    assert NO_TRACE_END not in {m for s in found.values() for m in s.marks}


def test_a_server_without_logprobs_is_used_without(prompts, tmp_path, capsys):
    with Served(logprobs="refused") as server:
        assert sample(prompts, tmp_path / "out", server, concurrency=1) == 0
        assert sum("logprobs" in request for request in server.requests) == 1
    assert {s.logprob_sum for s in rows(tmp_path / "out").values()} == {None}
    assert capsys.readouterr().err.count("tells no log-probs") == 1


# --- what a server makes of a prompt ---


def test_a_server_that_takes_no_token_ids_gets_texts(prompts, tmp_path, capsys):
    """`swift deploy` is one."""
    flags = ("--tokenizer", write_chat_model(tmp_path / "m", "r1"))
    with Served(ids=False) as server:
        assert sample(prompts, tmp_path / "out", server, concurrency=1, flags=flags) == 0
        asked = [request["prompt"] for request in server.requests if "prompt" in request]
    assert [type(prompt) for prompt in asked[:3]] == [list, str, str] and len(asked) == 25
    assert asked[1] == "<｜begin▁of▁sentence｜><｜User｜>What is 0?<｜Assistant｜><think>\n\n</think>\n\n"
    assert capsys.readouterr().err.count("takes no token ids") == 1


def test_something_around_a_rendered_prompt_ends_the_run(prompts, tmp_path, capsys):
    """`swift deploy` with its chat template around completions: another prompt than training's."""
    flags = ("--tokenizer", write_chat_model(tmp_path / "m", "thinking"))
    with Served(around=9) as server:
        assert sample(prompts, tmp_path / "out", server, flags=flags) == 2
    said = capsys.readouterr().err
    assert "tokens in a rendered prompt of" in said and "swift deploy puts its chat template around" in said
    assert not [key for key in rows(tmp_path / "out") if key.mode == "empty"]


@pytest.mark.parametrize("served", ["hybrid", "thinking"])
def test_a_server_that_ignores_the_switch_is_told(served, prompts, tmp_path, capsys):
    ours, theirs = (write_chat_model(tmp_path / family, family) for family in ("hybrid", served))
    with Served(tokenizer=str(theirs)) as server:
        assert sample(prompts, tmp_path / "out", server, flags=("--tokenizer", ours)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "it has another template" in line]
    assert len(told) == (2 if served == "thinking" else 0)  # once a mode
    assert all("or ignores enable_thinking" in line for line in told)


def test_no_torch_is_loaded(prompts, tmp_path):
    """Neither by help nor by a whole run: it starts on a login node in no time."""
    with Served() as server:
        code = (
            "import sys\nfrom megatron_bvpo.cli import bvpo\n"
            "try: bvpo(['sample', '--help'])\nexcept SystemExit: pass\nprint('first', *sys.modules)\n"
            f"bvpo(['sample', {str(prompts)!r}, '--out', {str(tmp_path / 'out')!r}, '--model', 'm', '--server', "
            f"{server.address!r}, '--max_tokens', '9', '--thinking_switch', 'x'])\nprint('then', *sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, then = (line.split() for line in done.stdout.splitlines() if line.startswith(("first", "then")))
    assert not {"torch", "transformers", "swift", "datasets", "aiohttp", "pyarrow", "jinja2", "tokenizers"} & {*first}
    assert not {"torch", "transformers", "swift", "datasets", "megatron"} & {*then} and "aiohttp" in then


# --- failed requests ---


def test_a_failed_request_is_recorded_told_and_asked_again_on_wish(prompts, tmp_path, capsys):
    with Served(always={"What is 3?": "400"}) as server:
        assert sample(prompts, tmp_path / "out", server) == 0
    failed = [s for s in rows(tmp_path / "out").values() if s.error]
    assert len(failed) == 8 and {s.error for s in failed} == {"400: a fault: 400"}
    assert {(s.text, s.finish_reason) for s in failed} == {(None, "error")}
    assert "failed 8 times: 400: a fault" in capsys.readouterr().err
    with Served() as server:
        sample(prompts, tmp_path / "out", server)
        assert not server.requests
        sample(prompts, tmp_path / "out", server, flags=(*HYBRID, "--retry_failed"))
        assert len(server.requests) == 8
    assert not [s for s in rows(tmp_path / "out").values() if s.error] and len(rows(tmp_path / "out")) == 48


def test_an_answer_that_came_at_last_is_judged(prompts, tmp_path):
    """Beside the judge's word on the request that failed."""
    judge = (*HYBRID, "--judge", "exact")
    for name, live in (("live", True), ("after", False)):
        out = tmp_path / name
        for always, retry in (({"What is 3?": "400"}, ()), ({}, ("--retry_failed",))):
            with Served(always=always) as server:
                assert sample(prompts, out, server, flags=((*judge, *retry) if live else (*HYBRID, *retry))) == 0
            if not live:
                assert bvpo(["judge", str(out), "--with", "exact"]) == 0
            said = list(read_judgements(out, "exact"))
            assert len(said) == 48 and sum(one.right is None for one in said) == (8 if always else 0)


def test_prompts_that_are_too_long_do_not_end_a_run_whose_answers_take_long(tmp_path, monkeypatch, capsys):
    """Refusals come at once; thirty of them are there before the first answer is."""
    monkeypatch.setattr(sampling_run, "_REFUSALS_AT_FIRST", 5)
    rows_of = [{"prompt": f"{'short' if i % 4 == 3 else 'long'} {i}"} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    flags = (*HYBRID, "--modes", "thinking")
    with Served(always={"long": "400"}, delay=1) as server:
        assert sample(tmp_path / "p.jsonl", tmp_path / "out", server, flags=flags, samples=1) == 0
    assert Counter(s.error for s in rows(tmp_path / "out").values()) == {None: 10, "400: a fault: 400": 30}
    with Served(always={"": "400"}, delay=1) as server:  # nothing is in flight that could be answered
        assert sample(tmp_path / "p.jsonl", tmp_path / "none", server, flags=flags, samples=1) == 2
        assert len(server.requests) < 20
    assert "thinking requests failed, and none has succeeded" in capsys.readouterr().err


def test_short_samples_share_the_fate_of_their_thinking_samples(prompts, tmp_path, monkeypatch):
    """So many that cannot be asked for are no sign of a wrong setting."""
    monkeypatch.setattr(sampling_run, "_REFUSALS_AT_FIRST", 5)
    model = write_chat_model(tmp_path / "m", "hybrid")
    with Served(always={f"What is {i}?": "400" for i in range(4)}, delay=0.5) as server:
        for modes in (("thinking",), ("thinking", "short", "--short_budget", "5")):
            flags = ("--tokenizer", model, "--modes", *modes)
            assert sample(prompts, tmp_path / "out", server, flags=flags, samples=2) == 0
    found = Counter((key.mode, s.error) for key, s in rows(tmp_path / "out").items())
    assert found == {
        ("thinking", "400: a fault: 400"): 8,
        ("short", "its thinking sample failed"): 8,
        ("thinking", None): 4,
        ("short", None): 4,
    }


def test_reasons_that_differ_in_numbers_are_one():
    told = Reasons()
    for reason in ("400: 9 tokens of 8", "400: 12 tokens of 8", "no server", "no server"):
        told.add(reason)
    assert told.lines() == ["failed 2 times, such as: 400: 9 tokens of 8", "failed 2 times: no server"]


def test_what_refuses_everything_spoils_nothing(prompts, tmp_path, capsys):
    with Served(always={"": "400"}) as server:
        assert sample(prompts, tmp_path / "out", server, samples=40) == 2
        assert len(server.requests) < 60  # of 480
    assert "requests failed, and none has succeeded: 400: a fault" in capsys.readouterr().err
    assert not rows(tmp_path / "out")


def test_a_mode_that_is_always_refused_ends_the_run(prompts, tmp_path, capsys):
    """Thinking goes well: its samples are kept, and no refusal of the other mode is recorded."""
    with Served(always={'"enable_thinking": false': "400"}) as server:
        assert sample(prompts, tmp_path / "out", server, samples=8) == 2
    assert re.search(r"the first 2\d empty requests failed", capsys.readouterr().err)
    found = rows(tmp_path / "out")
    assert found and {(key.mode, s.error) for key, s in found.items()} == {("thinking", None)}


# --- going on ---


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
