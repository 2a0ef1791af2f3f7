"""Does the run fit the GPUs: asks `bvpo plan`, which knows the model's layout and memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding
from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.errors import EXIT_CODE
from megatron_bvpo.launching.run_file import RunFile

BVPO = "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo(sys.argv[1:]))"
DOES_NOT_FIT, NOT_PLANNED = 1, 3


def plan_command(run: RunFile, job: Job, gpu_gib: float | None) -> list[str]:
    """`bvpo plan` for this run: its file, and those of its flags that change the plan."""
    from megatron_bvpo.planning.settings import RunSettings

    command = ["plan", run.file, "--nodes", str(job.nodes), "--gpus", str(job.gpus)]
    if run.value("model"):
        command += ["--model", run.value("model")]
    if gpu_gib:
        command += ["--gpu-memory", f"{gpu_gib:.1f}"]
    given = RunFile(run.argv[1:], run.argv[1:], {}, None)
    for field in dataclasses.fields(RunSettings):
        if field.name != "model" and given.is_given(field.name):
            command += ["--set", f"{field.name}={given.value(field.name)}"]
    return command


def check_plan(run: RunFile, job: Job, gpu_gib: float | None, timeout: float) -> list[Finding]:
    """What `bvpo plan` says of this run on these nodes. A process of its own: it may take long or fail."""
    if run.file is None:
        return [Finding("plan", WARNING, "not asked: it reads a YAML file", "Put the flags into one")]
    try:
        done = subprocess.run(
            [sys.executable, "-c", BVPO, *plan_command(run, job, gpu_gib)],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return [Finding("plan", WARNING, f"bvpo plan did not answer in {timeout:.0f} s", "Run it by hand")]
    return judge_plan(done.returncode, done.stdout, done.stderr)


def judge_plan(code: int, stdout: str, stderr: str) -> list[Finding]:
    """0: it fits; 1: it does not; 2: settings refused; 3: a model it does not know; else the plan's own failure."""
    said = [line.strip() for line in (stderr if code > DOES_NOT_FIT else stdout).splitlines() if line.strip()]
    last = said[-1].removeprefix("megatron-bvpo: error: ") if said else f"exit code {code}"
    if code == 0:
        return [Finding("plan", OK, last)]
    if code == DOES_NOT_FIT:
        return [Finding("plan", PROBLEM, last, "`bvpo plan --suggest` lists the layouts that fit")]
    if code == EXIT_CODE:
        return [Finding("plan", PROBLEM, last)]
    if code == NOT_PLANNED:  # no reason to stop a run
        return [Finding("plan", WARNING, last)]
    return [Finding("plan", WARNING, f"bvpo plan failed: {last}", "Run it by hand")]
