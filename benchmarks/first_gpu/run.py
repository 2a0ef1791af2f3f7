"""The driver: groups of cells in processes of their own, each cell with a limit; a line as soon as two runs can be
compared. What is there already is not run again, but what failed is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.first_gpu.judge import Disagreement, judge
from benchmarks.first_gpu.plan import LAYOUTS, REFERENCE, ROOT, RUN, Cell, Comparison, Group, rehearsed
from benchmarks.first_gpu.recorder import complete, merged
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.run import stop
from megatron_bvpo.cluster.run_logs import error_line, is_victim

LAST_SECONDS = 3.0


class Run:
    """One start.

    Args:
        folder: of the lines, the log and the cells.
        machine: what lines are filed under.
        ranks: on the device's side; the reference has one.
        gpu: False puts stand-ins on both sides.
        seconds: the budget of this start.
        patience: a cell's limit is this many times what it should take, and a minute.
        plant: cell → fault, for a test of the table (recorder.py).
    """

    def __init__(self, folder: Path, machine: str, ranks: int, *, gpu: bool, seconds: float, patience: float, plant):
        self.folder, self.machine, self.ranks, self.gpu = folder, machine, ranks, gpu
        self.patience, self.plant = patience, plant
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.lines = Lines(folder / "first-gpu.jsonl")
        self.log = folder / "first-gpu.log"
        self.failed: dict[str, str] = {}

    def __call__(self, groups: list[Group], comparisons: list[Comparison]) -> list[Comparison]:
        """Run what is missing; returns the comparisons that had no time."""
        self.cells = {cell.name: cell for group in groups for cell in group.cells}
        self.comparisons = comparisons
        self._forget_failures()
        needed = {name for c in self.open() for name in (c.cell, c.against)}
        for group in groups:
            cells = [c for c in group.cells if c.name in needed and self._to_run(c)]
            while cells and time.monotonic() < self.end - LAST_SECONDS:
                self._process(group, cells)
                cells = [c for c in cells if self._to_run(c)]
        self._judge_what_is_known()
        return self.open()

    # ---- what is known

    def found(self) -> dict[str, dict]:
        return self.lines.figures(self.machine)

    def open(self) -> list[Comparison]:
        """Comparisons without a line of this machine, or with one that an earlier start left as failed."""
        there = self.found()
        return [c for c in self.comparisons if c.key not in there]

    def _forget_failures(self) -> None:
        """What failed or was left out is tried again; the lines stay, and newer ones count."""
        for comparison in self.comparisons:
            line = self.found().get(comparison.key)
            if line is not None and (not line.get("ok") or "skipped" in line):
                self.lines.append({"key": comparison.key, "on": self.machine, "again": True})
                shutil.rmtree(self.place(self.cells[comparison.cell]), ignore_errors=True)

    def place(self, cell: Cell) -> Path:
        return self.cells_folder(cell.side) / cell.name

    def cells_folder(self, side: str) -> Path:
        """One folder for each machine: another one's numbers are others."""
        on = "cpu" if side == REFERENCE else "".join(c if c.isalnum() else "-" for c in self.machine)
        return self.folder / "cells" / on

    def ranks_of(self, side: str) -> int:
        return 1 if side == REFERENCE else self.ranks

    def _complete(self, cell: Cell) -> bool:
        return complete(self.place(cell), self.ranks_of(cell.side))

    def _to_run(self, cell: Cell) -> bool:
        if cell.goes_on_from and not self._complete(self.cells[cell.goes_on_from]):
            if cell.goes_on_from in self.failed:
                self.failed.setdefault(cell.name, f"{cell.goes_on_from}: {self.failed[cell.goes_on_from]}")
        possible = self.gpu or rehearsed(cell)
        return possible and cell.name not in self.failed and not self._complete(cell)

    # ---- comparisons

    def _judge_what_is_known(self) -> None:
        for comparison in self.open():
            line = self._line(comparison)
            if line is not None:
                about = {"means": comparison.means, "remedy": comparison.remedy, "dtype": comparison.dtype}
                self.lines.append({"key": comparison.key, "on": self.machine, **line, **about})
                print(f"[{self.clock()}] {comparison.key}: {told(line)}", flush=True)

    def _line(self, comparison: Comparison) -> dict | None:
        """What is known of it; None: nothing yet."""
        pair = [self.cells[name] for name in (comparison.cell, comparison.against)]
        for cell in pair:
            if not self.gpu and not rehearsed(cell):
                return {"ok": True, "skipped": f"the stand-ins have no {cell.stand_ins}: not rehearsed on a CPU"}
            if cell.name in self.failed:
                return {"ok": False, "failed": f"{cell.name}: {self.failed[cell.name]}"}
        if not all(self._complete(cell) for cell in pair):
            return None
        found, wanted = (merged(self.place(cell), self.ranks_of(cell.side)) for cell in pair)
        try:
            return judge(found, wanted, comparison.dtype, comparison.kind).line()
        except (Disagreement, KeyError, ZeroDivisionError) as error:
            return {"ok": False, "failed": f"cannot be compared: {type(error).__name__}: {error}"}

    # ---- processes

    def _process(self, group: Group, cells: list[Cell]) -> None:
        """Run the cells until all are there or one fails, which is then in `failed`."""
        side = cells[0].side
        where = self.cells_folder(side)
        where.mkdir(parents=True, exist_ok=True)
        rehearsal = side == REFERENCE or not self.gpu
        spec = self.folder / "group.json"
        spec.write_text(
            json.dumps(
                {
                    "cells": [self._as_spec(cell) for cell in cells],
                    "ranks": self.ranks_of(side),
                    "folder": str(where),
                    "timeout": self.end - time.monotonic(),
                    "rehearsal": rehearsal,
                }
            )
        )
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **group.env}
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if rehearsal:  # a GPU machine's CPU is the other side
            env["CUDA_VISIBLE_DEVICES"] = ""
        print(f"[{self.clock()}] {group.name}: {', '.join(c.name for c in cells)}", flush=True)
        with self.log.open("ab") as log:
            log.write(f"\n===== {group.name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.first_gpu.worker", str(spec)],
                env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            hung = self._watch(process, cells, group.start)
        finally:
            stop(process)
        self._judge_what_is_known()
        left = [cell for cell in cells if not self._complete(cell)]
        if left and time.monotonic() < self.end - LAST_SECONDS:
            self.failed[left[0].name] = hung or self._last_words(where, self.ranks_of(side), process.returncode)
            self._judge_what_is_known()

    def _as_spec(self, cell: Cell) -> dict:
        data = self.folder / "data"
        flags = f"--model {data / 'model'} --dataset {data / 'train.jsonl'} {RUN} {cell.flags}"
        flags += " " + LAYOUTS[self.ranks_of(cell.side)]
        if cell.goes_on_from:
            start = self.place(self.cells[cell.goes_on_from]) / "checkpoint-2"
            flags += f" --mcore_adapter {start} --finetune false"
        hook_args = {"starve": cell.starve, "save": cell.save, "fault": self.plant.get(cell.name, 0.0)}
        return {"name": cell.name, "argv": last_wins(flags.split()), "hook_args": hook_args}

    def _watch(self, process: subprocess.Popen, cells: list[Cell], start: float) -> str | None:
        """Wait for the process; what to say of its current cell if that took too long."""
        since, current, allowance = time.monotonic(), cells[0], self.patience * start
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if now > self.end - LAST_SECONDS:
                return None
            left = [cell for cell in cells if not self._complete(cell)]
            if left and left[0] is not current:
                self._judge_what_is_known()
                since, current, allowance = now, left[0], 0.0
            limit = self.patience * current.seconds + 60 + allowance
            if left and now - since > limit:
                return f"stopped after {now - since:.0f} s (limit {limit:.0f} s): it hangs, or is much too slow"
        return None

    def _last_words(self, where: Path, ranks: int, code: int | None) -> str:
        logs = [where / f"rank{rank}_of_{ranks}.log" for rank in range(ranks)]
        said = [line for log in logs if (line := error_line(log))]
        said.sort(key=is_victim)
        return said[0][:300] if said else f"its process ended with {code}; see {self.log}"

    def clock(self) -> str:
        return f"{time.monotonic() - self.began:4.0f} s"


def last_wins(flags: list[str]) -> list[str]:
    """`--flag value …` with every flag once: the last one counts, as it would for the parser."""
    found: dict[str, list[str]] = {}
    for token in flags:
        if token.startswith("--"):
            found[name := token] = []
        else:
            found[name].append(token)
    return [token for name, values in found.items() for token in (name, *values)]


def told(line: dict) -> str:
    if "skipped" in line:
        return line["skipped"]
    if "failed" in line:
        return f"FAILED: {line['failed']}"
    word = "ok" if line["ok"] else "FAILED"
    return f"{word}: {line['quantity']} {line['number']:.1e}, bound {line['bound']:.1e}"
