"""`bvpo preflight`: on every node before a run, what can be known to go wrong is looked for, in under two minutes.

All nodes run the same command. They meet on node 0 and tell each other what they found, in rounds:

1. `arrive`: who is there; each node has left a mark in the shared folders and compared its clock with node 0's;
2. `report`: versions, GPUs, disk, limits, data, the other nodes' marks; on node 0 also what `bvpo plan` says;
3. `links`: a process a GPU computes, and sends within its node, to its neighbours, and across all nodes.

Every round ends when all have told or when its time is over, and node 0's clock says when: so all nodes see the
same answers and come to the same verdict, and a node that is missing is named. (megatron_bvpo/launching/start_checks.py
is another thing: what each rank checks of its flags when it starts.)
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bvpo.cluster import compare, gpus, local_checks
from megatron_bvpo.cluster.findings import PROBLEM, WARNING, Finding, NodeReport
from megatron_bvpo.cluster.launch_environment import data_cache
from megatron_bvpo.cluster.links import run_links
from megatron_bvpo.cluster.meeting import Meeting, MeetingLost, MeetingRefused, Visitor
from megatron_bvpo.cluster.nodes import Job, interface_towards, job_from_environment
from megatron_bvpo.cluster.plan_check import check_plan
from megatron_bvpo.cluster.run_folder import refuse_unresumable, run_folder
from megatron_bvpo.cluster.shared_folders import SharedFolders
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.argv import rehearsal_requested
from megatron_bvpo.launching.run_file import RunFile, read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets

PURPOSE = "preflight"
EXIT_PROBLEM = 3
# Parts of the time limit at which the rounds end.
ROUNDS = {"arrive": 0.35, "report": 0.65, "links": 0.97}


# Flag → environment variable, default, meaning.
LIMITS = {
    "seconds": ("BVPO_PREFLIGHT_SECONDS", "110", "give up after so many seconds"),
    "min-free-gib": ("BVPO_MIN_FREE_GIB", "20", "GiB that the run's folder must have free"),
    "min-busbw": ("BVPO_MIN_BUSBW_GBS", "0", "GB/s of bus bandwidth across nodes below which is a warning"),
}


def _limit(args: argparse.Namespace, name: str) -> float:
    variable, default, _ = LIMITS[name]
    text = getattr(args, name.replace("-", "_")) or os.environ.get(variable) or default
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text!r} is no number", field=f"--{name} or {variable}", remedy="leave it out") from None


def add_command(commands) -> None:
    """Register `preflight` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "preflight",
        help="check every node of a job before it starts",
        description="Run this on every node with the same NNODES, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE and its "
        "own NODE_RANK; launch/train.sh does. Exit code 0: the run may start; 3: a problem, named with its node.",
    )
    for name, (variable, default, text) in LIMITS.items():
        parser.add_argument(f"--{name}", help=f"{text} (default: {variable}, else {default})")
    parser.add_argument(
        "given", metavar="RUN", nargs=argparse.REMAINDER, help="the run: a YAML file and flags, as for swift rlhf"
    )
    parser.set_defaults(run=run_command)


class Desk:
    """Node 0's side of the rounds. Times are in seconds since it was made."""

    def __init__(self, job: Job, seconds: float, now: Callable[[], float] = time.monotonic):
        self.job, self.seconds, self._now, self._start = job, seconds, now, now()
        self._told: dict[str, dict[int, Any]] = {name: {} for name in (*ROUNDS, "bye")}
        self._closed: dict[str, dict[int, Any]] = {}

    def answer(self, topic: str, rank: int, body: Any) -> Any:
        if topic == "clock":
            return time.time()
        told = self._told[topic]
        if topic not in self._closed:
            told.setdefault(rank, body)
            if len(told) == len(self._expected(topic)) or self._now() - self._start > self._limit(topic):
                self._closed[topic] = dict(told)
        answers = self._closed.get(topic)
        return {"open": answers is None, "told": {} if answers is None else answers}

    def _expected(self, topic: str) -> set[int]:
        """Who came; nobody else can tell more."""
        return (
            set(self._closed["arrive"])
            if topic != "arrive" and "arrive" in self._closed
            else set(range(self.job.nodes))
        )

    def _limit(self, topic: str) -> float:
        return ROUNDS.get(topic, 1.0) * self.seconds

    def all_gone(self) -> bool:
        return len(self._told["bye"]) >= len(self._expected("bye"))


class NodePreflight:
    """One node's way through the rounds."""

    def __init__(self, job: Job, run: RunFile, *, seconds: float, min_free_gib: float, min_busbw: float):
        self.job, self.run = job, run
        self.seconds, self.min_free_gib, self.min_busbw = seconds, min_free_gib, min_busbw
        self.rehearsal = rehearsal_requested() or run.env.get("BVPO_REHEARSAL") == "1"
        self.start = time.monotonic()
        own = Job(**{**vars(job), "address": "127.0.0.1"}) if job.rank == 0 else job
        self.visitor = Visitor(own, PURPOSE)
        self.shared = SharedFolders(shared_folders(run), job.rank)

    def verdict(self) -> tuple[dict[int, NodeReport], list[Finding]]:
        """All reports, and the findings about the job as a whole. Raises MeetingLost where node 0 is not there."""
        try:
            marks = _within(20, "shared folder", self.shared.write, self.shared.findings, {})
            clock = self._clock()
            arrived = self._round("arrive", {"name": self.job.name, "marks": marks})
            labels = {rank: f"node {rank} ({told['name']})" for rank, told in arrived.items()}
            report = self._own_report(arrived, labels, clock)
            reports = {r: NodeReport.from_json(told) for r, told in self._round("report", report.as_json()).items()}
            names = {rank: labels.get(rank, self.job.called(rank)) for rank in range(self.job.nodes)}
            where = f"{self.job.address}:{self.job.meeting_port}"
            whole = compare.missing_nodes(names, set(arrived), self.job.nodes, ROUNDS["arrive"] * self.seconds, where)
            for rank in set(arrived) - set(reports):
                whole.append(Finding("nodes", PROBLEM, f"{labels[rank]} came and then fell silent", "See its own log"))
            whole += compare.compare_facts(reports) + compare.compare_clocks(reports)
            if not any(f.level == PROBLEM for f in whole + [f for r in reports.values() for f in r.findings]):
                whole += self._link_round(reports)
            return reports, whole
        finally:
            self.shared.remove()

    # ---- rounds

    def _clock(self) -> tuple[float, float]:
        """(this clock minus node 0's, half the way there and back), in seconds."""
        deadline = self.start + ROUNDS["arrive"] * self.seconds
        self.visitor.ask_until("clock", None, deadline)  # the first one opens the way
        before = time.time()
        there = self.visitor.ask_until("clock", None, deadline)
        after = time.time()
        return (before + after) / 2 - there, (after - before) / 2

    def _round(self, topic: str, body: Any) -> dict[int, Any]:
        """Tell `body` and wait for the others' until the round is closed."""
        deadline = self.start + self.seconds + 10
        while True:
            told = self.visitor.ask_until(topic, body, min(deadline, time.monotonic() + 20))
            if not told["open"]:
                return {int(rank): what for rank, what in sorted(told["told"].items(), key=lambda item: int(item[0]))}
            if time.monotonic() > deadline:
                raise MeetingLost("node 0 does not close the round")
            time.sleep(0.2)

    def _link_round(self, reports: dict[int, NodeReport]) -> list[Finding]:
        left = ROUNDS["links"] * self.seconds - (time.monotonic() - self.start) - 3
        links = self._round("links", run_links(self.job, max(5.0, left), self.rehearsal))
        return compare.judge_links(links, {r: reports[r] for r in links}, self.min_busbw)

    # ---- this node

    def _own_report(self, arrived: dict[int, Any], labels: dict[int, str], clock) -> NodeReport:
        report = NodeReport(self.job.rank, self.job.name)
        findings = report.findings
        ports = local_checks.infiniband_ports()
        gpu_facts, gpu_findings = _within(
            40, "GPUs", lambda: gpus.check_gpus(self.job.gpus, self.rehearsal), findings, ({}, [])
        )
        data_facts, data_findings = _within(30, "data", lambda: local_checks.data_facts(self.run), findings, ({}, []))
        report.facts = {
            "clock": clock,
            "infiniband": ports,
            "hardware": {key: str(value) for key, value in gpu_facts.items()},
            "data": data_facts,
            "versions": local_checks.version_facts(),
        }
        findings += local_checks.check_versions() + gpu_findings
        findings += local_checks.check_cores(self.job.gpus, self.rehearsal)
        findings += local_checks.check_infiniband(ports, local_checks.locked_memory_limit())
        findings += self._own_disks() + data_findings + self._own_interface()
        deadline = min(time.monotonic() + 25, self.start + ROUNDS["report"] * self.seconds - 5)
        marks = {rank: told["marks"] for rank, told in arrived.items()}
        look = lambda: self.shared.look_for(marks, labels, deadline)  # noqa: E731
        findings += _within(35, "shared folder", look, findings, [])
        if self.job.rank == 0:
            left = ROUNDS["report"] * self.seconds - (time.monotonic() - self.start) - 3
            findings += check_plan(self.run, self.job, gpu_facts.get("GiB"), timeout=max(5.0, left))
        return report

    def _own_disks(self) -> list[Finding]:
        findings = _within(20, "temporary files", local_checks.check_scratch, [], [])
        run, rows, *_ = self.shared.folders
        if run.exists():
            findings.append(local_checks.check_disk(run, self.min_free_gib))
        if rows.exists() and self.job.rank == 0:  # rank 0 writes them for all
            findings.append(local_checks.check_room_for_rows(rows, self.run))
        return findings

    def _own_interface(self) -> list[Finding]:
        if self.job.nodes == 1:
            return []
        name = interface_towards(self.job.address)
        found = os.environ.get("GLOO_SOCKET_IFNAME")
        if name is None or found is None or found == name or self.job.rank == 0:
            return []
        text = f"GLOO_SOCKET_IFNAME is {found}, and the way to MASTER_ADDR is by {name}"
        return [Finding("network interface", WARNING, text, "Right only if both networks join all nodes")]


def _within(seconds: float, check: str, work: Callable[[], Any], findings: list[Finding], otherwise: Any) -> Any:
    """`work()`, or a finding if it hangs or fails: a dead mount or driver must not hold up the others."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def body():
        try:
            found.append(work())
        except Exception as e:  # whatever it is, it belongs into this node's report
            raised.append(e)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    what = f"the check failed: {type(raised[0]).__name__}: {raised[0]}" if raised else f"no answer in {seconds:g} s"
    findings.append(
        Finding(check, PROBLEM, what, "A mount or a driver of this node hangs: drain it" if not raised else "")
    )
    return otherwise


def shared_folders(run: RunFile) -> list[Path]:
    """The run's folder first, then that of its rows, then what BVPO_SHARED_FOLDERS lists (separated by colons)."""
    more = [Path(item) for item in os.environ.get("BVPO_SHARED_FOLDERS", "").split(":") if item]
    return list(dict.fromkeys([run_folder(run), data_cache(run_folder(run)), *more]))


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.cluster.node_report import print_verdict

    job = job_from_environment()
    run = read_run([item for item in args.given if item != "--"])
    refuse_secrets(run, dict(os.environ))
    refuse_unresumable(run)
    seconds, min_free_gib, min_busbw = (_limit(args, name) for name in LIMITS)
    started = time.monotonic()
    meeting = None
    if job.rank == 0:
        desk = Desk(job, seconds)
        meeting = Meeting(job, PURPOSE, desk.answer)
    preflight = NodePreflight(job, run, seconds=seconds, min_free_gib=min_free_gib, min_busbw=min_busbw)
    try:
        reports, whole = preflight.verdict()
        _say_bye(preflight.visitor)
        passed = print_verdict(job, reports, whole, time.monotonic() - started)
    except (MeetingLost, MeetingRefused) as e:
        passed = False
        where = f"{job.address}:{job.meeting_port}"
        print(
            f"preflight: PROBLEM  {job.label} cannot meet node 0 at {where}: {e}. Is the job running there? Is "
            "MASTER_ADDR the address that all nodes reach it by, and are MASTER_PORT and the next port open?",
            file=sys.stderr,
            flush=True,
        )
    if meeting is not None:
        deadline = time.monotonic() + 5
        while not desk.all_gone() and time.monotonic() < deadline:
            time.sleep(0.05)
        meeting.close()
    sys.stdout.flush()
    return 0 if passed else EXIT_PROBLEM


def _say_bye(visitor: Visitor) -> None:
    try:
        visitor.ask("bye")
    except (MeetingLost, MeetingRefused):
        pass
