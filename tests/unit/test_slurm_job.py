"""A stage as a Slurm job, with small programs in Slurm's place (tests/cluster has a real one)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_bvpo.workflow import slurm_job
from megatron_bvpo.workflow.stages import Slurm, Stage

# Each tells what it was asked; `states` has a line for each question about the job, and the last one stays.
PROGRAMS = {
    "sbatch": 'echo "sbatch $PWD WORD=$WORD ROOT=$BVPO_ROOT RUN=$BVPO_RUN_DIR $*" >>asked; '
    '[ ! -e refuse ] || { echo "sbatch: error: no such partition" >&2; exit 1; }; touch queued; echo "71;cluster"',
    "squeue": 'echo "squeue $*" >>asked; [ ! -e busy ] || { rm busy; echo "Unable to contact" >&2; exit 1; }; '
    "[ ! -e queued ] || echo 71",
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
    for name in ("asked", "refuse", "queued"):
        text = text.replace(f" {name}", f" {folder}/{name}").replace(f">>{name}", f">>{folder}/{name}")
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
    name = slurm_job.job_name(job.out, "train/a")
    assert name.startswith("out-") and name.endswith("/train/a")
    assert slurm_job.job_name(Path("/elsewhere/out"), "train/a") != name
    (line,) = asked(slurm, "sbatch")
    assert line == (
        f"sbatch {job.cwd} WORD=w ROOT=/co RUN= --parsable --job-name {name} --output {job.folder}/job-%j.log "
        "--nodes 4 /co/launch/slurm.sbatch run.yaml --lr 1"
    )
    assert job.said[0] == f"submitted as job 71, {name}; its output: {job.folder}/job-71.log"
    states = ["pending", "running", "completing", "pending", "running", "completed"]
    assert job.said[1:] == [f"job 71: {state}" for state in states]


def test_it_is_found_again_by_its_name(job, slurm):
    """The controller died before it wrote down the number."""
    (slurm / "queued").touch()
    (slurm / "busy").touch()
    (slurm / "states").write_text("RUNNING 0\nFAILED 9\n")
    assert job.run() == 9
    assert asked(slurm, "sbatch") == [] and len(asked(slurm, "squeue")) == 2 and "is there already" in job.said[0]
    assert f"--name {slurm_job.job_name(job.out, 'train/a')} " in asked(slurm, "squeue")[0]


@pytest.mark.parametrize(
    ("before", "again"), [("COMPLETED 0", False), ("CANCELLED 0", True), ("FAILED 3", True), ("forgotten", True)]
)
def test_it_ended_while_nobody_looked(job, slurm, before, again):
    (job.folder / "job").write_text("70")
    (slurm / "states").write_text(f"{before}\n" + "COMPLETED 0\n" * again)
    assert job.run() == 0
    assert len(asked(slurm, "sbatch")) == again


def test_what_slurm_has_forgotten_its_accounts_may_know(job, slurm):
    (slurm / "queued").touch()
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
