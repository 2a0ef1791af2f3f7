"""`bvpo sweep` on a real Slurm: a controller that was killed finds its jobs again by their names, a job that goes back
into the queue is waited for, and one that the user stops is not taken for a finished one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.workflow.records import Record, State
from megatron_bvpo.workflow.slurm_job import begins_with
from tests.cluster.small_run import losses, make_small_run
from tests.distributed.cells import ROOT

pytestmark = pytest.mark.slow
STEPS = 16
RUNS = ("one", "two", "three")  # on two nodes: the third one waits


class Sweep:
    """Its file, and controllers of it."""

    def __init__(self, slurm, home: Path):
        self.slurm, self.home, self.out = slurm, home, home / "out"
        make_small_run(home / "small", train_iters=STEPS, global_batch_size=4, save_steps=2)
        train = {"run": str(home / "small/small.yaml"), "slurm": {"nodes": 1, "time": 30}}
        runs = [{"name": name, "rows": "DS1", "lr": lr} for name, lr in zip(RUNS, (1e-3, 1e-4, 1e-2), strict=True)]
        asked = {"train": train, "rows": {"DS1": [str(home / "small/train.jsonl")]}, "runs": runs}
        (home / "sweep.yaml").write_text(yaml.safe_dump(asked))

    def start(self) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("BVPO_", "SLURM_"))}
        env |= {"BVPO_GPUS": "1", "BVPO_PYTHON_BIN": sys.executable, "BVPO_REHEARSAL": "1", "BVPO_MIN_FREE_GIB": "1"}
        env |= {"SLURM_CONF": self.slurm.env["SLURM_CONF"], "PYTHONPATH": str(ROOT), "BVPO_SLURM_POLL_S": "1"}
        command = [sys.executable, "-m", "megatron_bvpo", "sweep", "sweep.yaml", "--out", str(self.out)]
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.home, env=env, stdout=log, stderr=log)

    def jobs(self, stage: str) -> list[str]:
        """Numbers of all jobs of this name that Slurm knows."""
        text = self.slurm.ask("scontrol", "--oneliner", "show", "jobs")
        name = re.escape(begins_with(self.out, stage))
        return re.findall(rf"^JobId=(\d+) JobName={name}\w+ ", text, re.MULTILINE)

    def said(self) -> str:
        logs = "\n".join(p.read_text()[-2000:] for p in self.out.glob("stages/*/*/log.txt"))
        return (self.home / "log").read_text()[-3000:] + logs


def wait_for(condition, sweep: Sweep, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, sweep.said()
        time.sleep(0.2)
    return found


def test_one_controller_is_killed_and_one_job_each_is_cancelled_stopped_and_put_back(slurm, tmp_path):
    sweep = Sweep(slurm, tmp_path)
    first = sweep.start()
    wait_for(lambda: all(sweep.jobs(f"train/{name}") for name in RUNS), sweep, 300)
    wait_for(lambda: any(slurm.job(int(*sweep.jobs(f"train/{n}")))["JobState"] == "RUNNING" for n in RUNS), sweep, 60)
    first.kill()
    first.wait()
    # Its stages would wait on, and the next controller's for them. Killed too, they leave the jobs alone in the queue.
    for name in RUNS:
        os.kill(Record(sweep.out, f"train/{name}").holder(), 9)

    second = sweep.start()
    for name in RUNS:
        wait_for(lambda name=name: "is there already" in Record(sweep.out, f"train/{name}").log.read_text(), sweep, 120)
    cancelled = next(n for n in RUNS if slurm.job(int(*sweep.jobs(f"train/{n}")))["JobState"] == "PENDING")
    slurm.ask("scancel", *sweep.jobs(f"train/{cancelled}"))
    stopped, back = [name for name in RUNS if name != cancelled]
    saved = {name: sweep.out / f"runs/{name}/last-checkpoint" for name in (stopped, back)}
    wait_for(saved[stopped].exists, sweep, 300)
    (sweep.out / f"runs/{stopped}/stop").touch()
    wait_for(saved[back].exists, sweep, 300)
    slurm.ask("scontrol", "requeue", *sweep.jobs(f"train/{back}"))
    assert second.wait(timeout=420) == 4, sweep.said()
    told = (tmp_path / "log").read_text()
    assert f"failed: train/{cancelled}: exit code 1: " in told and told.count("failed: ") == 2
    assert f"failed: train/{stopped}: exit code 75: " in told and max(losses(sweep.out / f"runs/{stopped}")) < STEPS
    assert Record(sweep.out, f"train/{back}").state() == State.DONE
    (job,) = sweep.jobs(f"train/{back}")
    assert slurm.job(int(job))["Restarts"] == "1"
    said = Record(sweep.out, f"train/{back}").log.read_text()
    assert f"submitted as job {job}, " in said and said.count("submitted") == 1
    assert sorted(losses(sweep.out / "runs" / back)) == list(range(1, STEPS + 1))
    said = (sweep.out / f"stages/train/{back}/job-{job}.log").read_text()
    assert f"finished: {sweep.out}/runs/{back}, checkpoint-{STEPS}" in said

    # Asked again, it does only what is missing.
    assert sweep.start().wait(timeout=300) == 0, sweep.said()
    for name in (cancelled, stopped):
        assert sorted(losses(sweep.out / f"runs/{name}")) == list(range(1, STEPS + 1))
        assert len(sweep.jobs(f"train/{name}")) == 2
    assert len(sweep.jobs(f"train/{back}")) == 1
