"""Runs one stage of a chain: `python -m megatron_bvpo.workflow.stage OUT NAME`, as a rule of the Snakefile does.

It outlives a controller that is killed, and the next controller's process of the same stage waits for it, by the lock.
Where it is killed itself, the next one ends what it has started (leftovers.py). SIGTERM is handed on to the command,
which saves and ends; a second one kills.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_bvpo.workflow import slurm_job
from megatron_bvpo.workflow.leftovers import VARIABLE, end_processes_of, ends_with
from megatron_bvpo.workflow.records import Record
from megatron_bvpo.workflow.stages import FREE_PORT, Stage, environment, from_json, write_text

CHAIN = "chain.json"
STOPPED = 143


class Stopped(BaseException):
    """SIGTERM came."""


class StageRun:
    """One start of a stage."""

    def __init__(self, out: Path, stage: Stage, cwd: str):
        self.out, self.stage, self.cwd = out, stage, cwd
        self.record = Record(out, stage.name)
        self.child: subprocess.Popen | None = None
        self.starts_command, self.asked = False, False

    def run(self) -> int:
        """The exit code; 0 where it is done, by this start or an earlier one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            lock = self.record.take(self._tell_of_another)
            if self.record.done:
                return 0
            if left := end_processes_of(self.record.folder):
                self._say(f"ended {left} process(es) that an earlier start had left")
            began = self.record.begin(self.stage, self.out)
            code = self._work()
        except Stopped:
            self._say("stopped")
            return STOPPED
        stopped = code and self.asked  # to be gone on with, and no failure
        if not stopped and self.record.holds(lock):
            self.record.end(self.stage, code, began)
        lock.close()
        return code

    def _work(self) -> int:
        stage = self.stage
        if stage.whole and Path(self.cwd, stage.whole).exists():
            if older := self._older_than(Path(self.cwd, stage.whole)):
                self._say(f"error: {stage.whole} is older than what {older} made, and not of it: remove it")
                return 1
            self._say(f"{stage.whole} is there")
            return 0
        try:
            for path, text in stage.files.items():
                write_text(Path(self.cwd, path), text)
        except OSError as e:
            self._say(f"{e.filename} cannot be written: {e.strerror}")
            return 1
        self._say(stage.shown())
        if stage.slurm:
            return slurm_job.run(self.out, stage, self.cwd, self.record.folder, self._say)
        self.starts_command = True
        code = self._run_command()
        end_processes_of(self.record.folder)  # what it left would write on
        return code

    def _older_than(self, whole: Path) -> str | None:
        """The first stage of those that it is made from that ended after it was written: it was made from another."""
        written = whole.stat().st_mtime
        return next((name for name in self.stage.after if (Record(self.out, name).ended or 0) > written), None)

    def _run_command(self) -> int:
        own = {name: _free_port() if value == FREE_PORT else value for name, value in self.stage.env.items()}
        env = {**environment(), **own, VARIABLE: str(self.record.folder)}
        with self.record.log.open("ab") as log:
            try:
                # A session of its own: a signal to the controller's group must not end it unsaved.
                options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
                # Where this process is killed, the command saves and ends: nobody would wait for it.
                options["preexec_fn"] = ends_with(os.getpid(), signal.SIGTERM)
                self.child = subprocess.Popen(self.stage.words, cwd=self.cwd, env=env, **options)
            except OSError as e:
                self._say(f"{self.stage.words[0]} does not start: {e.strerror}")
                return 127
        if self.asked:  # while it started
            self.child.terminate()
        code = self.child.wait()
        return 128 - code if code < 0 else code

    def _on_signal(self, number: int, frame) -> None:
        again, self.asked = self.asked, True
        if not self.starts_command:
            raise Stopped
        if self.child is not None:
            self.child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def _tell_of_another(self, holder: dict) -> None:
        self._say(f"an earlier start (process {holder.get('pid')} on {holder.get('host')}) still runs: waiting for it")

    def _say(self, line: str) -> None:
        self.record.folder.mkdir(parents=True, exist_ok=True)
        with self.record.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def _free_port() -> str:
    """Free, and so is the next one, which a run uses, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return str(port)


def main(arguments: list[str]) -> int:
    out, name = Path(arguments[0]), arguments[1]
    chain = json.loads((out / CHAIN).read_text(encoding="utf-8"))
    os.chdir(chain["cwd"])
    found = next(stage for stage in chain["stages"] if stage["name"] == name)
    return StageRun(out, from_json(found), chain["cwd"]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
