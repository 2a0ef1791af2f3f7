"""launch/sample.sbatch on a real Slurm of two nodes, with the tests' own server in place of an engine.

The job is stopped twice in the middle: by the signal that comes before its time limit, and by Slurm, which puts a job
back where a node is wanted for another.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cli import bvpo
from megatron_bvpo.evaluation import scores_file
from megatron_bvpo.sampling.samples import read_judgements, read_samples
from megatron_bvpo.workflow.records import Record
from megatron_bvpo.workflow.sections import Place
from megatron_bvpo.workflow.stage_kinds import asking
from tests.cluster.slurm_cluster import GOING_ON, OWN_ADDRESSES, free_port
from tests.distributed.cells import ROOT
from tests.unit.chains import Controller, kill_all
from tests.unit.chains import wait_for as wait_until
from tests.unit.openai_server import Served

pytestmark = pytest.mark.slow
ADDRESSES = OWN_ADDRESSES
PROMPTS, SAMPLES, CONCURRENCY = 100, 4, 8


def samples(folder: Path) -> dict:
    """What is the same in every run."""
    found = list(read_samples(folder))
    assert len({s.key for s in found}) == len(found)
    return {s.key: s._replace(server=None, seconds=None) for s in found}


@pytest.fixture
def job(tmp_path) -> Path:
    rows = [{"prompt": f"What is {i}?", "answer": f"{i % 3}"} for i in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "prompts": "prompts.jsonl",
        "out": "samples",
        "model": "m",
        "thinking_switch": "enable_thinking",
        "samples": SAMPLES,
        "max_tokens": 100,
        "concurrency": CONCURRENCY,
        "judge": "exact",
        "engine": {"tensor_parallel_size": 8},  # of vllm serve: not read where the engine is another
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def engine(log: Path) -> str:
    """On node k at 127.0.0.(k + 1): half a second for sixteen answers or so, faults among them, the job's key."""
    options = {"delay": 0.1, "faults": {"500": 0.02, "drop": 0.02}, "key": "KEY"}
    words = json.dumps(options).replace("KEY", "'$VLLM_API_KEY'")
    server = ROOT / "tests" / "unit" / "openai_server.py"
    return f"exec {sys.executable} {server} $BVPO_ENGINE_PORT {log} '{words}' 127.0.0.$((SLURM_NODEID + 1))"


def wait_for_answers(slurm, number: int, out: Path, log: Path, more: int) -> None:
    have = len(list(read_samples(out))) if out.is_dir() else 0
    wait_for(slurm, number, log, lambda: len(list(read_samples(out))) >= have + more)


def wait_for(slurm, number: int, log: Path, true) -> None:
    deadline = time.monotonic() + 120
    while not true():
        told = log.read_text()[-4000:] if log.exists() else ""
        record = slurm.job(number)
        assert record["JobState"] in GOING_ON and time.monotonic() < deadline, f"{record}\n{told}"
        time.sleep(0.3)


def submit(slurm, job: Path, *words: str) -> tuple[int, Path, int]:
    """(number, log and the engines' port) of a job; `words` stand behind its file."""
    port, log = free_port(), job / "job.log"
    script, env = str(ROOT / "launch" / "sample.sbatch"), environment(job, port)
    return slurm.submit("--nodes=2", f"--output={log}", script, "job.yaml", *words, cwd=job, env=env), log, port


def environment(job: Path, port: int) -> dict[str, str]:
    """With an engine on that port of each node."""
    return {
        "BVPO_ROOT": str(ROOT),
        "BVPO_PYTHON_BIN": sys.executable,
        "BVPO_ENGINE_COMMAND": engine(job / "asked.log"),
        "BVPO_ENGINE_PORT": str(port),
    }


def test_it_samples_on_two_nodes_and_goes_on_after_every_stop(slurm, job):
    number, log, port = submit(slurm, job)
    out = job / "samples"
    wait_for_answers(slurm, number, out, log, 100)
    slurm.ask("scancel", "--signal=USR1", "--batch", str(number))  # what --signal=B:USR1@120 sends
    wait_for(slurm, number, log, lambda: slurm.job(number)["Restarts"] == "1")
    wait_for_answers(slurm, number, out, log, 100)
    slurm.ask("scontrol", "requeue", str(number))
    record = slurm.wait(number, 180, log)
    told = log.read_text()
    print(*[line for line in told.splitlines() if "sample.sbatch:" in line], sep="\n")
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "2"), told[-4000:]
    assert "SIGUSR1 after" in told and "the job goes back into the queue and goes on" in told
    assert "SIGTERM after" in told and "Slurm has put the job back into the queue" in told
    assert [int(n) for n in re.findall(r", start (\d+): engines on n0 n1, port", told)] == [1, 2, 3]
    assert told.count("2 of 2 engine(s) healthy") == 3 and "done: samples" in told

    with Served() as server:
        assert bvpo(["sample", str(job / "job.yaml"), *calm(job), "--server", server.address]) == 0
    assert samples(out) == samples(job / "calm")
    assert {j.key for j in read_judgements(out, "exact")} == samples(out).keys()
    assert {s.server for s in read_samples(out)} == {f"http://{address}:{port}" for address in ADDRESSES}
    # Every answer was asked for once, but for what was in flight at a stop, or met a fault.
    requests = Counter(line.split()[1] for line in (job / "asked.log").read_text().splitlines())
    faults = sum(1 for count in requests.values() if count > 1)
    assert faults <= 2 * CONCURRENCY + 0.1 * len(requests)
    assert not listening(port)


def test_through_a_chain_it_goes_on_after_its_time_limit_and_its_controller_s_end(slurm, job):
    stage = asking("round-1/sample", ["job.yaml"], (), Place({"nodes": 2}), 1)
    port, record = free_port(), Record(job / "chain", stage.name)
    more = {"SLURM_CONF": slurm.env["SLURM_CONF"], "BVPO_SLURM_POLL_S": "1", **environment(job, port)}
    first = Controller([stage], job / "chain", **more)
    wait_until(lambda: record.job, "a job")
    number, log = int(record.job), record.folder / f"job-{record.job}.log"
    wait_for_answers(slurm, number, job / "samples", log, 100)
    slurm.ask("scancel", "--signal=USR1", "--batch", str(number))
    wait_for(slurm, number, log, lambda: slurm.job(number)["Restarts"] == "1")
    holder = record.holder()
    assert holder, "the stage took the job's return to the queue for its end"
    kill_all([first.process.pid, holder])
    first.process.communicate()
    assert Controller([stage], job / "chain", **more).end(0, 180).endswith("1 of 1 stages done.\n")
    said = record.log.read_text()
    assert said.count("submitted as job") == 1 and f"job {number}, " in said and "is there already" in said
    assert len(samples(job / "samples")) == 2 * PROMPTS * SAMPLES and not listening(port)


def calm(job: Path) -> list[str]:
    """The same job undisturbed, in a folder of its own."""
    return [str(job / "prompts.jsonl"), "--out", str(job / "calm")]


def listening(port: int) -> list[str]:
    """The nodes whose engine is left running."""
    found = []
    for address in ADDRESSES:
        with socket.socket() as s:
            found += [address] if s.connect_ex((address, port)) == 0 else []
    return found


def test_a_job_that_is_cancelled_stays_so(slurm, job):
    number, log, port = submit(slurm, job)
    wait_for_answers(slurm, number, job / "samples", log, 50)
    slurm.ask("scancel", str(number))
    record = slurm.wait(number, 90, log)
    time.sleep(3)
    record = slurm.job(number)
    told = log.read_text()
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), told[-4000:]
    assert "it does not come back" in told and len(samples(job / "samples")) >= 50
    assert not listening(port)


def test_an_evaluation_goes_on_after_its_time_limit(slurm, job):
    """`-- bvpo eval …` in place of the file's own sampling."""
    suite = {"datasets": [{"file": "prompts.jsonl", "name": "q", "judge": "exact"}]}
    (job / "q.yaml").write_text(yaml.safe_dump(suite))
    how = f"--max_tokens 100 --thinking_switch enable_thinking --repeats 2 --concurrency {CONCURRENCY}"
    words = f"-- bvpo eval --suite q.yaml --model m --out eval {how}".split()
    number, log, port = submit(slurm, job, *words)
    answers = job / "eval" / "answers" / "q"
    wait_for_answers(slurm, number, answers, log, 100)
    slurm.ask("scancel", "--signal=USR1", "--batch", str(number))
    record = slurm.wait(number, 180, log)
    told = log.read_text()
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), told[-4000:]
    assert "the job goes back into the queue and goes on" in told and "done: eval" in told
    for score in scores_file.read(job / "eval").scores:
        assert (score.questions, score.answers, score.failed) == (PROMPTS, 2 * PROMPTS, 0)
    assert len(samples(answers)) == 4 * PROMPTS and not listening(port)
