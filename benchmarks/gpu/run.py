"""The driver: every job in a process of its own, with limits, within the budget.

It loads no torch, so that nothing a job does to the device or to its process can end the run. What is already in
the file for this card is skipped; what a killed run left half done is done again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.lines import Lines
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.plan import NOT_CARRIED, Figure, Job, Phase
from benchmarks.gpu.wheels import Wheels
from benchmarks.gpu.worker import TIME_IS_UP

FAILURES_OF_A_JOB = 2  # then the rest of its figures is given up: each try costs a start
ALONE = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}  # ranks are alone
LAST_SECONDS = 3.0  # to stop a process and write a line
SLACK = 0.5  # a phase that is kept just what its first figure needs still comes to it


class Run:
    """One start of the driver.

    Args:
        machine: what figures are filed under; `about` goes into every line.
        seconds: the budget, from `began` (time.monotonic()).
    """

    def __init__(self, phases: list[Phase], lines: Lines, log: Path, machine: str, about: dict, seconds: float):
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.phases, self.lines, self.log, self.machine = phases, lines, log, machine
        self.about = {"on": machine, **about}
        self.wheels = Wheels()

    def __call__(self) -> list[Figure]:
        """Run what is missing; return the figures that had no time."""
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            self.folder = Path(folder)
            self.wheels.start(self.folder)
            try:
                for i, phase in enumerate(self.phases):
                    if self.missing(phase.figures):
                        until = self.until(i)
                        print(f"[{self.clock()}] {phase.name}: until {until - self.began:.0f} s", flush=True)
                        for job in phase.jobs:
                            self.job(job, until)
            finally:
                self.wheels.stop()
        return self.missing([figure for phase in self.phases for figure in phase.figures])

    def clock(self) -> str:
        return f"{time.monotonic() - self.began:5.0f} s"

    def missing(self, figures: list[Figure]) -> list[Figure]:
        there = self.lines.figures(self.machine)
        return [figure for figure in figures if figure.key not in there]

    def until(self, i: int) -> float:
        """When phase `i` must end, so that those after it have their seconds; it may take its first figure anyway."""
        last = self.end - LAST_SECONDS
        whole = sum(min(phase.seconds, self.needs(phase)) for phase in self.phases)
        share = min(1.0, (self.end - self.began) / whole)  # of what a phase would have in a run that is long enough
        kept = 0.0
        for phase in self.phases[i + 1 :]:
            kept += max(share * min(phase.seconds, self.needs(phase)), self.first_needs(phase))
        return min(max(last - kept, time.monotonic() + self.first_needs(self.phases[i])), last)

    def needs(self, phase: Phase) -> float:
        """Seconds for what is still missing of it."""
        jobs = [(job, self.missing(job.figures)) for job in phase.jobs]
        return sum(job.start + sum(figure.seconds for figure in left) for job, left in jobs if left)

    def first_needs(self, phase: Phase) -> float:
        jobs = [(job, self.missing(job.figures)) for job in phase.jobs]
        return next((job.start + left[0].seconds for job, left in jobs if left), 0.0) + SLACK

    # ------------------------------------------------------------------------------------------- one job

    def job(self, job: Job, until: float) -> None:
        if job.needs and not self.wheels.found(job.needs, until):
            why = f"{job.needs} is not installed"
            for figure in self.missing(job.figures):
                self.give_up(figure, f"{why}: {NOT_CARRIED[job.needs]}" if job.needs in NOT_CARRIED else why)
        for _ in range(FAILURES_OF_A_JOB):
            left = self.missing(job.figures)
            if not left or time.monotonic() + job.start + left[0].seconds > until:
                return
            why = self.process(job, left, until)
            if why is None:
                return
            left = self.missing(job.figures)
            if left and why != "":
                self.give_up(left[0], why)
        for figure in self.missing(job.figures):
            self.give_up(figure, f"not tried: {FAILURES_OF_A_JOB} figures of this process had failed")

    def give_up(self, figure: Figure, why: str) -> None:
        print(f"[{self.clock()}] {figure.key}: {why}", flush=True)
        self.lines.append({"key": figure.key, **self.about, "failed": why})

    def process(self, job: Job, left: list[Figure], until: float) -> str | None:
        """Run the figures `left`. None: as far as the time went; else why the first one without a line failed,
        or "" where the figure at fault has its line."""
        spec = self.folder / "job.json"
        figures = [asdict(figure) for figure in left]
        spec.write_text(
            json.dumps({"figures": figures, "lines": str(self.lines.file), "until": until, "about": self.about})
        )
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **ALONE, **job.env}
        env["PYTHONPATH"] = self.wheels.path(until) if job.wheels else env["PYTHONPATH"]
        print(f"[{self.clock()}] {job.name}: {len(left)} figures", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.worker", str(spec)]
        with self.log.open("ab") as log:
            log.write(f"\n===== {job.name}\n".encode())
            log.flush()
            begun = log.tell()
            process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            hung = self.watch(process, job, left)
        finally:
            stop(process)
        if hung is not None:
            return hung
        if process.returncode in (0, TIME_IS_UP):
            return None
        return f"process ended with {process.returncode}: {self.last_words(begun)}"

    def watch(self, process: subprocess.Popen, job: Job, left: list[Figure]) -> str | None:
        """Wait for the process. What to write of its current figure if that took too long; None if it ended itself
        or the run's time is up (which is no failure)."""
        since, current = time.monotonic(), left[0]
        allowance = 4 * job.start
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if now > self.end - LAST_SECONDS:
                print(f"[{self.clock()}] {current.key}: stopped, time is up", flush=True)
                process.returncode = TIME_IS_UP if stop(process) else process.returncode
                return None
            open_ones = self.missing(left)
            if not open_ones:
                continue
            if open_ones[0].key != current.key:
                since, current, allowance = now, open_ones[0], 0.0
            if now - since > current.limit + allowance:
                return f"stopped after {now - since:.0f} s (limit {current.limit + allowance:.0f} s)"
        return None

    def last_words(self, begun: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begun)
            said = log.read().decode(errors="replace").strip().splitlines()
        return said[-1][-300:] if said else "it said nothing"


def stop(process: subprocess.Popen) -> bool:
    """Kill the process and what it started; True if it was still running."""
    running = process.poll() is None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return running
