"""Runs a chain on Snakemake's local executor: what is missing, what may side by side, and on past what fails.

    run_chain(stages, out, cores=8).exit_code

Snakemake decides what runs when and draws the graph; each rule starts `workflow.stage`, which keeps the records that a
later start skips by (records.py). Snakemake ends with this process, however that ends; running stages do not, and the
next start waits for them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.workflow.leftovers import ends_with
from megatron_bvpo.workflow.records import Record, State, origin, take_lock
from megatron_bvpo.workflow.stages import (
    Slurm,
    Stage,
    difference,
    environment_of_snakemake,
    in_order,
    to_json,
    write_json,
)

__all__ = ["Outcome", "Slurm", "Stage", "run_chain"]

SOME_FAILED = 4
LOG = "snakemake.log"
DRAWN = {".dot": "dot", ".gv": "dot", ".mmd": "mermaid-js"}
PICTURES = (".svg", ".png", ".pdf")


@dataclass
class Outcome:
    """How a chain ended.

    Attributes:
        states: stage → its state.
        failed: stage → why; also those that ended without a word.
        not_reached: stage → the stages that it waits for and that failed.
        stopped_by: the signal that ended it.
    """

    states: dict[str, State]
    failed: dict[str, str] = field(default_factory=dict)
    not_reached: dict[str, list[str]] = field(default_factory=dict)
    stopped_by: int | None = None

    @property
    def exit_code(self) -> int:
        """0: all is done; 4: something failed, and the rest went on; 128 and more: a signal."""
        if self.stopped_by:
            return 128 + self.stopped_by
        return SOME_FAILED if self.failed else 0


def run_chain(
    stages: list[Stage], out: Path, *, cores: int | None = None, dry_run: bool = False, graph: Path | None = None
) -> Outcome:
    """Run what is not done yet.

    Args:
        out: the chain's folder; made here.
        cores: what stages that run here may use together; the largest stage's by default, so that runs on one machine's
            GPUs come one after the other.
        dry_run: print the commands and their states, and run nothing.
        graph: draw the chain into this file instead: .dot, .mmd (Mermaid), or .svg, .png, .pdf where graphviz is.

    Raises:
        UserError: another controller works in `out`; a stage that has begun was another command then, or what it is
            made from has been done again; too few cores; the extra [workflow] is missing.
    """
    stages, out = in_order(stages), Path(os.path.realpath(out))
    cores = _cores(stages, cores)
    _require_work(stages)
    _require_the_same(stages, out)
    if graph is not None:
        _draw(stages, out, Path(graph))
    elif dry_run:
        for stage in stages:
            print(f"{stage.name}: {Record(out, stage.name).state()}\n    {stage.shown()}")
    if graph is not None or dry_run:
        return Outcome(_states(stages, out))
    _require_snakemake()
    out.mkdir(parents=True, exist_ok=True)
    with take_lock(out / "lock", lambda holder: _refuse_second(out, holder)):
        outcome = Controller(stages, out, cores).run()
    print("\n".join(table(outcome, out)), flush=True)
    return outcome


class Controller:
    """One start of a chain."""

    def __init__(self, stages: list[Stage], out: Path, cores: int):
        self.stages, self.out, self.cores = stages, out, cores
        self.snakemake: subprocess.Popen | None = None
        self.stopped_by: int | None = None
        self._asked, self._told = 0, _states(stages, out)

    def run(self) -> Outcome:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _write_chain(self.stages, self.out, self.out)
            command = snakemake_command(self.out, self.cores, len(self.stages))
            with (self.out / LOG).open("ab") as log:
                self.snakemake = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env=environment_of_snakemake(self.out), preexec_fn=ends_with(os.getpid(), signal.SIGKILL),
                )  # fmt: skip
            handed_on = 0
            while self.snakemake.poll() is None:
                if self._asked > handed_on:
                    handed_on = self._asked
                    self._stop()
                time.sleep(0.3)
                self._tell_changes()
            self._tell_changes()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._judged()

    def _on_signal(self, number: int, frame) -> None:
        self.stopped_by, self._asked = number, self._asked + 1

    def _stop(self) -> None:
        print("Stopping: what runs saves and ends (asked again: at once); Slurm jobs stay in the queue.", flush=True)
        # Snakemake begins nothing more; its stages, which are in its group, hand the signal on.
        group = self.snakemake.pid
        os.killpg(group, signal.SIGTERM)
        # And those that an earlier controller has started.
        for stage in self.stages:
            pid = Record(self.out, stage.name).holder()
            try:
                if pid and os.getpgid(pid) != group:
                    os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass

    def _tell_changes(self) -> None:
        for stage in self.stages:
            record = Record(self.out, stage.name)
            state = record.state()
            if state != self._told[stage.name] and (line := _change(state, record)):
                print(f"{time.strftime('%H:%M:%S')} {stage.name}: {line}", flush=True)
            self._told[stage.name] = state

    def _judged(self) -> Outcome:
        outcome = Outcome(_states(self.stages, self.out), stopped_by=self.stopped_by)
        for stage in self.stages:  # in order
            why = _why(outcome.states[stage.name], Record(self.out, stage.name), bool(self.stopped_by))
            if blocked := [name for name in stage.after if name in outcome.failed or name in outcome.not_reached]:
                outcome.not_reached[stage.name] = blocked
            elif why:
                outcome.failed[stage.name] = why
        if self.snakemake.returncode and not outcome.failed and not self.stopped_by:
            raise RuntimeError(f"Snakemake ended with {self.snakemake.returncode}; its words: {self.out / LOG}")
        return outcome


def table(outcome: Outcome, out: Path) -> list[str]:
    """What is not done and why, and a last line that sums up."""
    lines = []
    for name, why in outcome.failed.items():
        lines.append(f"failed: {name}: {why}; {Record(out, name).log}")
    for name, waits in outcome.not_reached.items():
        lines.append(f"not reached: {name}, which needs {' and '.join(waits)}")
    done = sum(state == State.DONE for state in outcome.states.values())
    again = "" if done == len(outcome.states) else "; the same command goes on with what is missing"
    return [*lines, f"{done} of {len(outcome.states)} stages done{again}."]


def snakemake_command(out: Path, cores: int, stages: int) -> list[str]:
    """Each stage counts as one of Snakemake's own cores; how many run side by side is the resource's part.

    Only what is missing runs, whatever the dates of files say: --rerun-triggers input, and no metadata to trigger.
    """
    flags = (
        f"--cores {stages + 1} --resources here={cores} --scheduler greedy --keep-going --keep-incomplete "
        "--ignore-incomplete --drop-metadata --nolock --rerun-triggers input --nocolor --quiet rules"
    )
    return [*_snakemake(out), *flags.split()]


def _snakemake(out: Path) -> list[str]:
    file = Path(__file__).with_name("Snakefile")
    own = ["--profile", "none", "--workflow-profile", "none"]  # and not what a person or site has for other workflows
    return [sys.executable, "-m", "snakemake", *own, "--snakefile", str(file), "--directory", str(out)]


def _states(stages: list[Stage], out: Path) -> dict[str, State]:
    return {stage.name: Record(out, stage.name).state() for stage in stages}


def _write_chain(stages: list[Stage], out: Path, folder: Path) -> None:
    """chain.json of `folder` and a mark for each stage that is done in `out`. What still runs comes first, as what it
    uses is not free."""
    states = _states(stages, out)
    running = [name for name, state in states.items() if state == State.RUNNING]
    found = {"out": str(out), "cwd": os.getcwd(), "python": sys.executable, "running": running}
    write_json(folder / "chain.json", {**found, "stages": to_json(stages)})
    shutil.rmtree(folder / "marks", ignore_errors=True)
    (folder / "marks").mkdir()
    for i, stage in enumerate(stages):
        if states[stage.name] == State.DONE:
            (folder / "marks" / str(i)).touch()


def _why(state: State, record: Record, stopped: bool) -> str | None:
    """Why a stage is not done although what it needs is; None where it is done, or was stopped."""
    if state == State.FAILED:
        found = record.failure()
        last = found.get("last") or [""]
        line = next((line for line in reversed(last) if "error" in line.lower()), last[-1])
        return f"exit code {found.get('code')}: {line.strip()[:300]}"
    if stopped:
        return None
    if state == State.RUNNING:
        return "Snakemake was killed, and the stage still runs; the next start waits for it"
    return "its process was killed" if state == State.STOPPED else None


def _change(state: State, record: Record) -> str:
    if state == State.DONE:
        began, ended = record.times() or (0, 0)
        return f"done after {_duration(ended - began)}"
    if state == State.RUNNING:
        return "running"
    return f"failed with exit code {record.failure().get('code')}" if state == State.FAILED else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _cores(stages: list[Stage], cores: int | None) -> int:
    largest = max((stage for stage in stages if not stage.slurm), key=lambda stage: stage.cores, default=None)
    needed = largest.cores if largest else 1
    if cores is not None and cores < needed:
        message = f"is {cores}, and {largest.name} alone uses {needed}"
        raise UserError(message, field="--cores", remedy=f"give {needed} or more, or leave it out")
    return needed if cores is None else cores


def _require_work(stages: list[Stage]) -> None:
    """Raises UserError where jobs would end well and have done nothing."""
    if os.environ.get("BVPO_PREFLIGHT") == "only" and any(stage.slurm for stage in stages):
        message = "is only: a job would check its nodes, train nothing and end as a finished one"
        raise UserError(message, field="BVPO_PREFLIGHT", remedy="unset it")


def _require_the_same(stages: list[Stage], out: Path) -> None:
    """Raises UserError for a stage that began as another one: its files would be kept, or mixed, without a word."""
    for stage in stages:
        record, now = Record(out, stage.name), origin(stage, out)
        before = record.begun_as(stage.kept)
        if not before and not record.done:
            continue
        if before.get("what", now["what"]) != now["what"]:
            raise UserError(
                f"is not what {stage.name} was when it began: {difference(before['what'], now['what'])}",
                file=str(record.folder),
                remedy=f"Give the new chain another --out; or, to do this stage again, {_undoing(record)}.",
            )
        for name, ended in now["made_from"].items():
            if ended is None or before.get("made_from", {}).get(name, ended) != ended:
                has = "is done" if record.done else "has begun"
                is_now = "is not done any more" if ended is None else "was done again since"
                raise UserError(
                    f"{stage.name} {has}, and {name}, which it was made from, {is_now}",
                    file=str(record.folder),
                    remedy=f"{_undoing(record).capitalize()}, too.",
                )


def _undoing(record: Record) -> str:
    """What is to be done before a stage can be done again. What still works for it comes first."""
    first = ""
    if record.state() == State.RUNNING:
        first = f"end process {record.holder()}, " if record.holder() else "end what runs it, "
    if record.job and not record.done:
        first += f"scancel {record.job}, "
    return f"{first}remove that folder and what the stage has made"


def _refuse_second(out: Path, holder: dict) -> None:
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"
    raise UserError(f"{who} runs in this folder", file=str(out), field="--out", remedy="Wait for it, or stop it.")


def _require_snakemake() -> None:
    from importlib.util import find_spec

    if find_spec("snakemake") is None:
        raise UserError("Snakemake is not installed", remedy="pip install 'megatron-bvpo[workflow]'")


def _draw(stages: list[Stage], out: Path, file: Path) -> None:
    _require_snakemake()
    if file.suffix not in {*DRAWN, *PICTURES}:
        endings = ", ".join([*DRAWN, *PICTURES])
        raise UserError(f"ends in none of {endings}", file=str(file), field="--graph", remedy="name it graph.dot")
    if file.suffix in PICTURES and shutil.which("dot") is None:
        remedy = "install graphviz, or draw graph.dot or graph.mmd"
        raise UserError("graphviz (dot) is not on PATH", file=str(file), field="--graph", remedy=remedy)
    with tempfile.TemporaryDirectory() as folder:
        _write_chain(stages, out, Path(folder))
        form = DRAWN.get(file.suffix, "dot")
        command = [*_snakemake(Path(folder)), "--dag", form]
        env = environment_of_snakemake(Path(folder))
        text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    if file.suffix in DRAWN:
        file.write_text(text, encoding="utf-8")
    else:
        subprocess.run(["dot", f"-T{file.suffix[1:]}", "-o", str(file)], input=text, text=True, check=True)
