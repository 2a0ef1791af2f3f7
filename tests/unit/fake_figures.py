"""Figures that take their time, raise, crash or hang, and a driver of them; no torch."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.lines import Lines
from benchmarks.gpu.plan import Figure, Job, Phase
from benchmarks.gpu.run import Run

HERE = "tests.unit.fake_figures"


class Unavailable(RuntimeError):
    pass


def fine(value: float, seconds: float = 0.0) -> dict:
    time.sleep(seconds)
    return {"ms": value}


def raises() -> dict:
    raise ValueError("no such\nshape")


def missing() -> dict:
    raise Unavailable("the peer (not installed)")


def crashes() -> dict:
    print("about to go", flush=True)
    os._exit(13)


def hangs() -> dict:
    time.sleep(600)
    return {}


def figure(key: str, call: str, should_take: float = 0.1, **args) -> Figure:
    return Figure(key, f"{HERE}:{call}", args, should_take, patience=2.0)


def job(name: str, *figures: Figure) -> Job:
    return Job(name, list(figures), start=0.5)


def run(folder: Path, phases: list[Phase], seconds: float = 60.0) -> tuple[list[Figure], dict[str, dict]]:
    """(what had no time, key → line)"""
    lines = Lines(folder / "gpu.jsonl")
    left = Run(phases, lines, folder / "gpu.log", "a card", {"run": "1"}, seconds)()
    return left, lines.figures("a card")


def slow_phases() -> list[Phase]:
    """Twelve figures of 0.15 s in two jobs: something to kill in the middle of."""
    jobs = [job(f"job {j}", *(figure(f"{j}/{i}", "fine", value=i, seconds=0.15) for i in range(6))) for j in range(2)]
    return [Phase("slow", 30, jobs)]


if __name__ == "__main__":
    # As figures import this file by its name, so does the driver: a class must not exist twice.
    from tests.unit import fake_figures

    fake_figures.run(Path(sys.argv[1]), fake_figures.slow_phases())
