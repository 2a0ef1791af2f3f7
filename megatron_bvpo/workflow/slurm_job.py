"""A stage as a Slurm job: submitted once, found again by its name, waited for through its returns to the queue."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from megatron_bvpo.workflow.leftovers import ends_with
from megatron_bvpo.workflow.records import Record, origin
from megatron_bvpo.workflow.stages import Stage, environment

# Seconds between two questions to Slurm, whose controller many jobs share.
POLL = float(os.environ.get("BVPO_SLURM_POLL_S") or 15)
# Seconds in which Slurm's controller may be busy or restarting.
PATIENCE = 600.0
# States of a job that has not ended. The scripts put a job back into the queue before its time limit.
GOING_ON = {
    "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
    "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED",
}  # fmt: skip


class SlurmSilent(Exception):
    """Slurm does not answer, or refuses; the text is its own."""


class InTheQueue(Exception):
    """A job that must not be waited for, nor one submitted beside it; the text says why and what to do."""


def begins_with(out: Path, stage: str) -> str:
    """How the names of a stage's jobs begin: with chain and stage, and the chain's folder, as two chains may have the
    same name."""
    chain = re.sub(r"[^A-Za-z0-9._-]", "_", out.name)
    return f"{chain}-{_digest(str(out))}/{stage}:"


def job_name(out: Path, stage: Stage) -> str:
    """Also of what the stage is made from: a job of other settings is not waited for."""
    return begins_with(out, stage.name) + _digest(json.dumps(origin(stage, out), sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run(out: Path, stage: Stage, cwd: str, folder: Path, say) -> int:
    """Submit the stage, unless a job of its name is there already, and wait; the exit code.

    Args:
        cwd: where it is submitted.
        folder: of the stage's records; the job's own log goes there.
        say: told what happens, a line each.
    """
    name = job_name(out, stage)
    try:
        job = _find(name, Record(out, stage.name).job_file)
        if job is None:
            job = _submit(stage, name, cwd, folder)
            say(f"submitted as job {job}, {name}; its output: {folder}/job-{job}.log")
        else:
            say(f"job {job}, {name}, is there already: waiting for it")
        return _wait(job, say)
    except (SlurmSilent, InTheQueue) as e:
        say(str(e))
        return 1


def _find(name: str, number: Path) -> str | None:
    """A job of this name that has not ended, or the one that this stage submitted and that ended well meanwhile.

    Args:
        number: the file that tells which it submitted.

    Raises:
        InTheQueue: there are two, or one of the same stage as it was asked for before.
    """
    shown = _ask("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%A %j")
    beginning = name.rpartition(":")[0] + ":"
    found = [line.split(maxsplit=1) for line in shown.splitlines()]
    jobs = {job: its for job, its in found if its.startswith(beginning)}
    if others := [job for job, its in jobs.items() if its != name]:
        message = f"error: job {', '.join(others)} is of this stage as it was asked for before"
        raise InTheQueue(f"{message}: scancel {' '.join(others)}, and start again")
    if len(jobs) > 1:
        message = f"error: jobs {', '.join(jobs)} are the same stage's and write into one folder"
        raise InTheQueue(f"{message}: scancel {' '.join(jobs)}, and start again")
    if jobs:
        return next(iter(jobs))
    if not number.exists():
        return None
    job = number.read_text().strip()
    # Taken away: a job that failed is not looked at again at the next start.
    number.unlink()
    return job if _state(job)[0] == "COMPLETED" else None


def _submit(stage: Stage, name: str, cwd: str, folder: Path) -> str:
    env = {**environment(), **stage.env}
    script = Path(stage.slurm.script)
    env.setdefault("BVPO_ROOT", str(script.resolve().parent.parent))
    flags = ["--parsable", "--export=ALL", "--job-name", name, "--output", f"{folder}/job-%j.log", *stage.slurm.flags]
    # An sbatch that waits for Slurm when this process is killed would submit a second job beside the next start's.
    how = {"cwd": cwd, "env": env, "patience": 0, "preexec_fn": ends_with(os.getpid(), signal.SIGKILL)}
    told = _ask("sbatch", *flags, str(script), *stage.command, **how)
    job = told.strip().splitlines()[-1].partition(";")[0]
    (folder / "job").write_text(job)
    return job


def _wait(job: str, say) -> int:
    before = ""
    while True:
        state, code = _state(job)
        if state != before:
            say(f"job {job}: {state.lower()}")
            before = state
        if state == "COMPLETED":
            return 0
        if state not in GOING_ON:
            return code or 1
        time.sleep(POLL)


def _state(job: str) -> tuple[str, int]:
    """State and exit code; UNKNOWN where Slurm has forgotten the job and keeps no accounts."""
    try:
        told = _ask("scontrol", "--oneliner", "show", "job", job)
        state = re.search(r"\bJobState=(\w+)", told).group(1)
        return state, int(re.search(r"\bExitCode=(\d+)", told).group(1))
    except SlurmSilent as e:
        if "Invalid job id" not in str(e):
            raise
    try:
        flags = ["--noheader", "--parsable2", "--allocations", "--format", "State,ExitCode", "--jobs", job]
        told = _ask("sacct", *flags, patience=0)
        state, code = told.strip().splitlines()[-1].split("|")
        return state.split()[0].rstrip("+"), int(code.partition(":")[0])
    except (SlurmSilent, IndexError, ValueError):
        return "UNKNOWN", 1


def _ask(*command: str, patience: float = PATIENCE, **options) -> str:
    """What Slurm prints. A controller that is busy or restarting is asked again.

    Raises:
        SlurmSilent: there is no such program, Slurm refuses, or it does not answer for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
            if done.returncode == 0:
                return done.stdout
            told = done.stderr.strip()
        except subprocess.TimeoutExpired:
            told = "no answer in 60 s"
        except FileNotFoundError:
            raise SlurmSilent(f"there is no {command[0]} on this machine; start the chain on a login node") from None
        if "Invalid job id" in told or time.monotonic() >= deadline:
            raise SlurmSilent(f"{command[0]}: {told}")
        time.sleep(min(POLL, 5))
