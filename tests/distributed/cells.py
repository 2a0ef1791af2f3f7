"""Run many training runs ("cells") on one set of ranks: start-up is most of a run's time.

A cell is a full command line for the real pipeline. The worker processes stay alive between cells and
take Megatron's process groups down and up again. They are forked from a process that has loaded the stack
(nursery.py): loading it takes a rank longer than a cell.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tests.distributed.fork_worker import READY

# Gloo keeps the threads of groups that are gone: about 60 a cell.
CELLS_A_PROCESS = 6
ROOT = Path(__file__).resolve().parents[2]

# What a CPU needs, as in the README's table of rehearsal flags; more of them by hand (docs/logprob.md).
CPU_FLAGS = (
    "--ddp_backend gloo --attention_backend flash --torch_dtype float32 --fp16 false --bf16 false "
    "--recompute_granularity none --gradient_accumulation_fusion false --masked_softmax_fusion false "
    "--bias_dropout_fusion false --moe_permute_fusion false --dataloader_num_workers 0 "
    "--dataloader_persistent_workers false --dataloader_pin_memory false --check_model false --add_version false "
    "--report_to tensorboard --load_from_cache_file false --dataset_num_proc 1 " + os.environ.get("BVPO_CELL_FLAGS", "")
).split()

# What GPU configurations have on, by ms-swift's defaults or by configs/, and a CPU's cheap runs leave out. The rest of
# CPU_FLAGS is of another kind: tests/contracts/test_shipped_flags.py has the reasons.
SHIPPED_FLAGS = (
    "--gradient_accumulation_fusion true --moe_permute_fusion true --masked_softmax_fusion true "
    "--bias_dropout_fusion true --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 "
    "--dataloader_num_workers 1 --dataloader_persistent_workers true --dataloader_pin_memory true"
).split()


@dataclass
class Cell:
    """One run.

    Attributes:
        name: unique in its list; the output folder is named after it.
        argv: command-line arguments after `rlhf`, without --output_dir.
        hook: `module:function` called with the trainer class; returns a class to use instead.
        type: rlhf_type; `dpo` runs ms-swift's own pipeline.
        hook_args: passed to the hook.
        may_fail: an exception is recorded instead of ending the worker.
        keep_folder: go on in the folder that an earlier run left.
        canaries: a warning of the canaries is expected; in all other cells it is a failure.
    """

    name: str
    argv: list[str]
    hook: str = "tests.distributed.recorders:record_first_step"
    type: str = "bvpo"
    hook_args: dict = field(default_factory=dict)
    may_fail: bool = False
    keep_folder: bool = False
    canaries: bool = False


@dataclass
class CellResult:
    """What a cell left behind: its folder, the lines of logging.jsonl, what the hook recorded, rank 0's output."""

    name: str
    folder: Path
    log: list[dict]
    recorded: dict
    rank_0: Path
    error: str | None = None

    def steps(self, key: str) -> list[float]:
        return [line[key] for line in self.log if key in line and "iteration" in line]


def run_cells(
    world_size: int,
    cells: list[Cell],
    folder: Path,
    *,
    timeout: float = 1500,
    rehearsal: bool = True,
    forked: bool = True,
    lane: str = "",
) -> dict[str, CellResult]:
    """Run `cells` one after the other on `world_size` ranks; raises AssertionError with the ranks' logs.

    `lane` is in the names of the ranks' files, for runs beside these in the same folder (`run_beside`).
    `rehearsal` puts the stand-ins in place; on a GPU those for Transformer Engine alone (benchmarks). Rehearsals are
    `forked` unless there is a GPU, which a fork would not survive.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(cells), CELLS_A_PROCESS):
        batch = cells[first : first + CELLS_A_PROCESS]
        _run_batch(world_size, batch, folder, timeout, rehearsal, forked, lane)
    log = folder / f"rank0_of_{world_size}{lane}.log"
    return {cell.name: _result(cell, folder, log) for cell in cells}


def run_beside(folder: Path, *lists: list[Cell]) -> dict[str, CellResult]:
    """Cells of one rank, which leaves a core idle: each list in a process of its own, beside the others."""
    if torch.cuda.is_available():  # of which there may be one
        return run_cells(1, [cell for cells in lists for cell in cells], folder)
    nursery()  # one, whichever list asks first
    with ThreadPoolExecutor(len(lists)) as pool:
        lanes = [pool.submit(run_cells, 1, cells, folder, lane=f"-{i}") for i, cells in enumerate(lists)]
    return {name: result for lane in lanes for name, result in lane.result().items()}


def run_by_ranks(folder: Path, by_ranks: dict[int, list[Cell]]) -> dict[str, CellResult]:
    """Cells by how many ranks they have, none of which needs another."""
    found: dict[str, CellResult] = {}
    for ranks, cells in by_ranks.items():
        found |= run_beside(folder, cells[::2], cells[1::2]) if ranks == 1 else run_cells(ranks, cells, folder)
    return found


def _run_batch(
    world_size: int, cells: list[Cell], folder: Path, timeout: float, rehearsal: bool, forked: bool, lane: str
) -> None:
    for cell in cells:
        if not cell.keep_folder:
            shutil.rmtree(folder / cell.name, ignore_errors=True)
    spec = folder / f"spec_{world_size}{lane}.json"
    for port in folder.glob(f"port{lane}_*"):
        port.unlink()
    spec.write_text(json.dumps({"cells": [asdict(c) for c in cells], "folder": str(folder), "lane": lane}))
    workers = []
    for rank in range(world_size):
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "BVPO_REHEARSAL": "1" if rehearsal else "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(),
        }
        log = folder / f"rank{rank}_of_{world_size}{lane}.log"
        if rehearsal and forked and not torch.cuda.is_available():
            workers.append(nursery().start(spec, log, env))
        else:
            command = [sys.executable, "-m", "tests.distributed.cell_worker", str(spec)]
            workers.append(
                subprocess.Popen(
                    command, env={**os.environ, **env}, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT
                )
            )
    _wait(workers, folder, f"{world_size}{lane}", timeout)


def python_path() -> str:
    """This checkout first, and what the environment names behind it."""
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


class Nursery:
    """The process that forks ranks."""

    def __init__(self):
        env = {**os.environ, "BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        command = [sys.executable, "-m", "tests.distributed.nursery"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, **pipes)
        answer = self.process.stdout.readline().strip()
        assert answer == READY, f"the process that forks ranks did not start: {answer}"
        self.one_question = threading.Lock()

    def ask(self, **command):
        with self.one_question:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(self, spec: Path, log: Path, env: dict[str, str]) -> ForkedRank:
        return ForkedRank(self, self.ask(start={"spec": str(spec), "log": str(log), "env": env}))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class ForkedRank:
    """A forked child with the few methods of subprocess.Popen that are needed here."""

    def __init__(self, nursery: Nursery, pid: int):
        self.nursery, self.pid, self.code = nursery, pid, None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.nursery.ask(poll=self.pid)
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        return self.code


@functools.cache
def nursery() -> Nursery:
    """The one of this test session."""
    made = Nursery()
    atexit.register(made.close)
    return made


def _wait(workers, folder: Path, ranks: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(w.poll() is None for w in workers):
        failed = [w for w in workers if w.poll() not in (None, 0)]
        if failed or time.monotonic() > end:
            time.sleep(2)
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
            break
        time.sleep(0.2)
    codes = [w.wait() for w in workers]
    if any(codes):
        tails = []
        for rank in range(len(workers)):
            text = (folder / f"rank{rank}_of_{ranks}.log").read_text(errors="replace")
            tails.append(f"--- rank {rank} (exit {codes[rank]}) ---\n{text[-3000:]}")
        raise AssertionError("ranks failed:\n" + "\n".join(tails))


def _result(cell: Cell, folder: Path, rank_0: Path) -> CellResult:
    out = folder / cell.name
    log_file = out / "logging.jsonl"
    log = [json.loads(line) for line in log_file.read_text().splitlines()] if log_file.exists() else []
    recorded_file = out / "recorded.pt"
    recorded = torch.load(recorded_file, weights_only=False) if recorded_file.exists() else {}
    error_file = out / "error.txt"
    error = error_file.read_text() if error_file.exists() else None
    return CellResult(cell.name, out, log, recorded, rank_0, error)
