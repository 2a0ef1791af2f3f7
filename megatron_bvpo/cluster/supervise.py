"""`bvpo supervise`: runs ms-swift on this node, watches over all nodes, and says in the end what happened.

    train.sh → bvpo preflight → bvpo supervise → swift rlhf → torchrun → ranks

What it adds to `swift rlhf`: the run goes on from its last checkpoint; each rank has its own log; a request to
stop (SIGUSR1, SIGTERM, or the file `stop` in the run's folder) becomes a save and an orderly end; a node that
falls silent or fails is named on all nodes within a minute and ends the job instead of the allocation.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.cluster.launch_environment import (
    flight_recorder_folder,
    launch_environment,
    log_folder,
    swift_command,
)
from megatron_bvpo.cluster.meeting import Meeting, MeetingLost, MeetingRefused, Visitor
from megatron_bvpo.cluster.nodes import Job, job_from_environment
from megatron_bvpo.cluster.roll_call import ENDED, RUNNING, RollCall
from megatron_bvpo.cluster.run_folder import reached, refuse_unresumable, resume_flags, run_folder
from megatron_bvpo.cluster.run_logs import first_error, is_victim
from megatron_bvpo.launching.argv import is_true
from megatron_bvpo.launching.run_file import read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets

PURPOSE = "run"
# Exit codes beside the run's own. 75 is EX_TEMPFAIL of sysexits.h: start the same command again.
STOPPED, NODE_LOST = 75, 76
# Seconds between two beats.
BEAT = 2.0
# Seconds that ranks get to write down why they end, before they are killed.
GRACE = 15.0
# Seconds in which a node that has failed by itself comes to say so: torchrun gives its ranks 30 s to end.
VICTIM_PATIENCE = 45.0


def add_command(commands) -> None:
    """Register `supervise` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "supervise",
        help="run ms-swift on this node and watch over all nodes",
        description="launch/train.sh calls it after the preflight. Exit code 75: stopped on request, saved, may go "
        "on; 76: a node was lost; else the run's own.",
    )
    parser.add_argument(
        "given", metavar="RUN", nargs=argparse.REMAINDER, help="the run: a YAML file and flags, as for swift rlhf"
    )
    parser.set_defaults(run=run_command)


@dataclass(frozen=True)
class Trouble:
    """Why all nodes must end: a sentence that names the node, and whether that node is gone."""

    text: str
    node_lost: bool


class Watch:
    """The beats of this node, and on node 0 the book of all nodes. One node needs neither."""

    def __init__(self, job: Job, silence: float):
        self.job, self.silence = job, silence
        self.book: RollCall | None = None
        self._meeting: Meeting | None = None
        self._answered = time.monotonic()
        self.over = False
        if job.nodes == 1:
            return
        if job.rank == 0:
            self.book = RollCall({rank: job.called(rank) for rank in range(job.nodes)}, silence)
            self._meeting = Meeting(job, PURPOSE, self.book.answer)
        own = Job(**{**vars(job), "address": "127.0.0.1"}) if job.rank == 0 else job
        self._visitor = Visitor(own, PURPOSE)

    def beat(self, state: str, code: int | None = None, message: str = "") -> Trouble | None:
        """Tell node 0; returns why the job must end, if it must."""
        if self.job.nodes == 1:
            return None
        body = {"name": self.job.name, "state": state, "code": code, "message": message[:2000]}
        try:
            told = self._visitor.ask("beat", body, timeout=min(5.0, self.silence / 2))
        except (MeetingLost, MeetingRefused) as e:
            quiet = time.monotonic() - self._answered
            if quiet <= self.silence:
                return None
            text = f"node 0 ({self.job.address}) does not answer {self.job.label} for {quiet:.0f} s ({e})"
            return Trouble(f"{text}: one of the two is cut off", node_lost=True)
        self._answered, self.over = time.monotonic(), bool(told["over"])
        return Trouble(told["trouble"], node_lost=bool(told["lost"])) if told["trouble"] else None

    def close(self, seconds: float) -> None:
        """Node 0 stays until the others know how it ended."""
        if self._meeting is None:
            return
        deadline = time.monotonic() + seconds
        while not self.book.all_told() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._meeting.close()


class Supervisor:
    """One node's run from start to end."""

    def __init__(self, job: Job, command: list[str], env: dict[str, str], logs: Path, silence: float):
        self.job, self.command, self.env, self.logs = job, command, env, logs
        self.stop_file = Path(env["BVPO_STOP_FILE"])
        self.watch = Watch(job, silence)
        self.process: subprocess.Popen | None = None
        self.trouble: Trouble | None = None
        self._old_logs = set(logs.iterdir()) if logs.exists() else set()

    def run(self) -> int:
        """Returns the exit code of this node."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        adopt_orphans()
        try:
            # A group of its own: what the scheduler sends to this process's group must not end the ranks unsaved.
            # Inside of the try: an interrupt may come when the launcher runs and Popen has not returned yet.
            self.process = subprocess.Popen(self.command, env=self.env, start_new_session=True)
            code = self._wait()
        except KeyboardInterrupt:
            code = 130
            self._end_run(signal.SIGINT)
        if code and self._left():  # the launcher has died by itself and left its ranks
            self._end_run(signal.SIGTERM)
        return self._finish(code)

    def _on_signal(self, number: int, frame) -> None:
        print(f"supervise: {signal.Signals(number).name}: asking the run to save and stop.", flush=True)
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        if not self.stop_file.exists():  # an empty one is a user's, who wants no restart (slurm.sbatch reads it)
            self.stop_file.write_text(f"{signal.Signals(number).name}\n")

    def _wait(self) -> int:
        next_beat = 0.0
        while (code := self.process.poll()) is None:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT
                bury_orphans(self.process.pid)
                self.trouble = self.watch.beat(RUNNING)
                if self.trouble:
                    print(
                        f"supervise: {self.trouble.text}; ending the run on {self.job.label}.",
                        file=sys.stderr,
                        flush=True,
                    )
                    return self._end_run(signal.SIGTERM)
            time.sleep(0.2)
        return code

    def _end_run(self, number: int) -> int:
        """End everything that the run has started on this node; the code that it left with.

        The launcher may end first: its ranks are then this process's children (adopt_orphans), so that the second
        round finds them too, and so does what they have started in the meantime.
        """
        for what, seconds in ((number, GRACE), (signal.SIGKILL, 10.0)):
            self._tell(what)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self._left():
                time.sleep(0.2)
                self.watch.beat(RUNNING)
                if what == signal.SIGKILL:
                    self._tell(what)
        code = self.process.poll() if self.process else None
        return -signal.SIGKILL if code is None else code

    def _left(self) -> list[int]:
        """What still runs of all that this process has started."""
        return [pid for pid in descendants(os.getpid()) if _is_alive(pid)]

    def _tell(self, number: int) -> None:
        for pid in self._left():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def _finish(self, code: int) -> int:
        message = first_error(self.logs, self._old_logs) if code else ""
        if code and not self.trouble and is_victim(message):
            self._hear_the_cause()
        if self.trouble:
            code = NODE_LOST if self.trouble.node_lost else code or 1
        elif code == 0 and self._was_stopped():
            code = STOPPED
        told = 0 if code == STOPPED else code
        other = self.watch.beat(ENDED, told, message)
        deadline = time.monotonic() + self.watch.silence + 5
        # A node that is done first waits to hear how the others end: one of them may yet be lost.
        while self.job.nodes > 1 and not (other or self.watch.over) and time.monotonic() < deadline:
            time.sleep(0.5)
            other = self.watch.beat(ENDED, told, message)
        if other and code in (0, STOPPED):
            self.trouble, code = other, NODE_LOST if other.node_lost else 1
        self.watch.close(GRACE + 15)
        self._summary(code, message)
        return code

    def _hear_the_cause(self) -> None:
        """This node only lost its connection to another one, which may still be ending: let that one speak first."""
        deadline = time.monotonic() + VICTIM_PATIENCE
        while self.job.nodes > 1 and not self.trouble and time.monotonic() < deadline:
            time.sleep(0.5)
            self.trouble = self.watch.beat(RUNNING)

    def _was_stopped(self) -> bool:
        return Path(f"{self.stop_file}.done").exists()

    def _summary(self, code: int, message: str) -> None:
        """What happened, on node 0 (elsewhere one line): on the screen and in the run's folder."""
        folder = self.stop_file.parent
        words = {0: "finished", STOPPED: "stopped on request, saved, can go on", NODE_LOST: "a node was lost"}
        outcome = words.get(code, f"failed with exit code {code}")
        lines = [f"supervise: {self.job.label}: {outcome}; checkpoint at step {reached(folder)} in {folder}"]
        if self.trouble:
            lines.append(f"supervise:   {self.trouble.text}")
        if message:
            lines.append(f"supervise:   first error here: {message}")
        nodes: list[dict[str, Any]] = []
        if self.watch.book is not None:
            nodes = self.watch.book.table()
            for row in nodes:
                what = row["state"] if row["code"] is None else f"{row['state']} with {row['code']}"
                lines.append(f"supervise:   {row['node']}: {what}" + (f"; {row['message']}" if row["message"] else ""))
        lines.append(f"supervise:   logs of the ranks: {self.logs}")
        print("\n".join(lines), file=sys.stderr if code not in (0, STOPPED) else sys.stdout, flush=True)
        if self.job.rank == 0:
            trouble = self.trouble.text if self.trouble else None
            summary = {"outcome": outcome, "code": code, "trouble": trouble, "error": message, "nodes": nodes}
            summary["checkpoint_step"] = reached(folder)
            (self.logs.parent / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def adopt_orphans() -> None:
    """Processes below this one whose parent ends become its children, and not init's: prctl(2), Linux only.

    Without it a rank whose torchrun has died could not be found any more.
    """
    PR_SET_CHILD_SUBREAPER = 36  # noqa: N806  (the name in linux/prctl.h)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury_orphans(launcher: int) -> None:
    """Let go of adopted children that have ended: they would be kept in the process table as long as the run lasts."""
    for pid in descendants(os.getpid()):
        if pid != launcher and not _is_alive(pid):
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # another's child
                pass


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc: torchrun gives each rank a session of its own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_command(args: argparse.Namespace) -> int:
    job = job_from_environment()
    run = read_run([item for item in args.given if item != "--"])
    refuse_secrets(run, dict(os.environ))
    refuse_unresumable(run)
    folder = run_folder(run)
    logs = log_folder(folder, job)
    logs.mkdir(parents=True, exist_ok=True)
    env = launch_environment(job, run, folder, logs)
    flight_recorder_folder(logs).mkdir(parents=True, exist_ok=True)
    if job.rank == 0:
        Path(env["BVPO_STOP_FILE"] + ".done").unlink(missing_ok=True)
        if "BVPO_STOP_FILE" not in os.environ:  # a batch script that names the file has cleared it before the preflight
            Path(env["BVPO_STOP_FILE"]).unlink(missing_ok=True)
    resume = resume_flags(run, folder) if env["BVPO_RESUME"] == "auto" else []
    if resume and job.rank == 0:
        start = run.value("mcore_adapter") or run.value("mcore_model")
        instead = f", and not from {start}, where the run began (BVPO_RESUME=never begins anew)" if start else ""
        print(f"supervise: going on from {resume[-1]}{instead}", flush=True)
        if is_true(list(run.flags), "no_load_optim"):
            print(
                "supervise: no_load_optim: the optimizer and the rate's warm-up begin anew at each restart", flush=True
            )
    command = swift_command(run, folder, resume)
    return Supervisor(job, command, env, logs, float(env["BVPO_NODE_SILENCE_S"])).run()
