"""A stage as a Slurm job, with small programs in Slurm's place (tests/cluster has a real one)."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest

from megatron_bvpo.workflow import slurm_job
from megatron_bvpo.workflow.records import Record
from megatron_bvpo.workflow.stages import Slurm, Stage
from tests.unit.chains import is_over, wait_for

# Each tells what it was asked; `states` has a line for each question about the job, and the last one stays.
PROGRAMS = {
    "sbatch": 'echo "sbatch $PWD WORD=$WORD ROOT=$BVPO_ROOT RUN=$BVPO_RUN_DIR $*" >>asked; '
    '[ ! -e refuse ] || { echo "sbatch: error: no such partition" >&2; exit 1; }; '
    "[ ! -e deaf ] || { echo $$ >waiting; exec sleep 100; }; "
    'while [ "$1" != --job-name ]; do shift; done; echo "71 $2" >queued; echo "71;cluster"',
    "squeue": 'echo "squeue $*" >>asked; [ ! -e busy ] || { rm busy; echo "Unable to contact" >&2; exit 1; }; '
    "[ ! -e queued ] || cat queued",
    "scontrol": 'line="$(head -n 1 states)"; [ "$(wc -l <states)" = 1 ] || sed -i 1d states; '
    '[ "$line" != forgotten ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }; '
    'echo "JobId=$4 JobName=x JobState=${line%% *} ExitCode=${line##* }:0 Restarts=0"',
    "sacct": "[ -e accounts ] || exit 1; cat accounts",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of the programs' files; every question comes at once."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\ncd "{folder}"\n{text}\n' if name != "sbatch" else f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    text = (folder / "sbatch").read_text()
    for name in ("asked", "refuse", "deaf", "waiting", "queued"):
        text = text.replace(f" {name}", f" {folder}/{name}").replace(f">{name}", f">{folder}/{name}")
    (folder / "sbatch").write_text(text)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("BVPO_RUN_DIR", "/another/run")
    monkeypatch.setattr(slurm_job, "POLL", 0.01)
    monkeypatch.setattr(slurm_job, "PATIENCE", 2)
    return folder


class Job:
    """The stage, and what it says."""

    def __init__(self, tmp_path: Path):
        self.out, self.folder, self.cwd = tmp_path / "out", tmp_path / "out/stages/train/a", tmp_path / "cwd"
        self.folder.mkdir(parents=True)
        self.cwd.mkdir()
        script = Slurm("/co/launch/slurm.sbatch", ("--nodes", "4"))
        self.stage = Stage("train/a", ("run.yaml", "--lr", "1"), env={"WORD": "w"}, slurm=script)
        self.said: list[str] = []

    @property
    def name(self) -> str:
        return slurm_job.job_name(self.out, self.stage)

    def run(self) -> int:
        self.said.clear()
        return slurm_job.run(self.out, self.stage, str(self.cwd), self.folder, self.said.append)


@pytest.fixture
def job(tmp_path, slurm):
    return Job(tmp_path)


def asked(slurm: Path, program: str) -> list[str]:
    return [line for line in (slurm / "asked").read_text().splitlines() if line.startswith(program)]


def test_it_is_submitted_once_and_waited_for_through_its_returns(job, slurm):
    (slurm / "states").write_text("PENDING 0\nRUNNING 0\nCOMPLETING 0\nPENDING 0\nRUNNING 0\nCOMPLETED 0\n")
    assert job.run() == 0
    name = job.name
    assert re.fullmatch("out-[0-9a-f]{8}/train/a:[0-9a-f]{8}", name)
    assert slurm_job.begins_with(Path("/elsewhere/out"), "train/a") != slurm_job.begins_with(job.out, "train/a")
    assert slurm_job.begins_with(Path("/my, own/one"), "a") != slurm_job.begins_with(Path("/my, own/two"), "a")
    assert re.fullmatch("a_b_c-[0-9a-f]{8}/one:", slurm_job.begins_with(Path("/a,b c"), "one"))
    (line,) = asked(slurm, "sbatch")
    assert line == (
        f"sbatch {job.cwd} WORD=w ROOT=/co RUN= --parsable --export=ALL --job-name {name} "
        f"--output {job.folder}/job-%j.log --nodes 4 /co/launch/slurm.sbatch run.yaml --lr 1"
    )
    assert job.said[0] == f"submitted as job 71, {name}; its output: {job.folder}/job-71.log"
    states = ["pending", "running", "completing", "pending", "running", "completed"]
    assert job.said[1:] == [f"job 71: {state}" for state in states]


def test_it_is_found_again_by_its_name(job, slurm):
    """The controller died before it wrote down the number."""
    other = f"{slurm_job.begins_with(job.out, 'train/ab')}1234"
    (slurm / "queued").write_text(f"70 {other}\n71 {job.name}\n72 of another kind\n")
    (slurm / "busy").touch()
    (slurm / "states").write_text("RUNNING 0\nFAILED 9\n")
    assert job.run() == 9
    assert asked(slurm, "sbatch") == [] and len(asked(slurm, "squeue")) == 2
    assert job.said[0] == f"job 71, {job.name}, is there already: waiting for it"


def test_a_job_that_is_not_this_stage_s_is_not_waited_for(job, slurm):
    """The stage was asked for otherwise and its folder removed, or what it is made from was done again; or two jobs
    would write into one folder."""
    before = job.name
    (slurm / "queued").write_text(f"70 {before}\n")
    job.stage = dataclasses.replace(job.stage, command=("run.yaml", "--lr", "2"), after=("fill",))
    assert job.name != before
    assert job.run() == 1 and asked(slurm, "sbatch") == []
    assert job.said == ["error: job 70 is of this stage as it was asked for before: scancel 70, and start again"]
    made_from_nothing, fill = job.name, Stage("fill", ("true",))
    record = Record(job.out, "fill")
    record.end(fill, 0, record.begin(fill, job.out))
    assert job.name != made_from_nothing
    (slurm / "queued").write_text(f"70 {job.name}\n72 {job.name}\n")
    assert job.run() == 1 and asked(slurm, "sbatch") == []
    assert job.said[0].startswith("error: jobs 70, 72 are the same stage's and write into one folder: scancel 70 72")


def test_an_sbatch_that_waits_ends_with_its_stage(job, slurm):
    """It would submit a job when Slurm answers, beside the one of the next start."""
    (slurm / "deaf").touch()
    stage = os.fork()
    if not stage:
        job.run()
        os._exit(0)
    waiting = slurm / "waiting"
    wait_for(lambda: waiting.exists() and waiting.read_text().strip(), "sbatch")
    os.kill(stage, signal.SIGKILL)
    os.waitpid(stage, 0)
    wait_for(lambda: is_over(int(waiting.read_text())), "its end", 20)


@pytest.mark.parametrize(
    ("before", "again"), [("COMPLETED 0", False), ("CANCELLED 0", True), ("FAILED 3", True), ("forgotten", True)]
)
def test_it_ended_while_nobody_looked(job, slurm, before, again):
    (job.folder / "job").write_text("70")
    (slurm / "states").write_text(f"{before}\n" + "COMPLETED 0\n" * again)
    assert job.run() == 0
    assert len(asked(slurm, "sbatch")) == again


def test_what_slurm_has_forgotten_its_accounts_may_know(job, slurm):
    (slurm / "queued").write_text(f"71 {job.name}\n")
    (slurm / "states").write_text("RUNNING 0\nforgotten\n")
    assert job.run() == 1 and job.said[-1] == "job 71: unknown"
    (slurm / "accounts").write_text("CANCELLED by 0|0:15\n")
    assert job.run() == 1 and job.said[-1] == "job 71: cancelled"
    (slurm / "accounts").write_text("COMPLETED|0:0\n")
    assert job.run() == 0


def test_refusals_are_told(job, slurm, monkeypatch):
    (slurm / "refuse").touch()
    assert job.run() == 1 and job.said == ["sbatch: sbatch: error: no such partition"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert job.run() == 1
    assert job.said == ["there is no squeue on this machine; start the chain on a login node"]
