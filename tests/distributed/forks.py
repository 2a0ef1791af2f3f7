"""Whole runs in forked children: each gets a fresh process, can be killed for real, and starts in no time.

Loading the stack takes most of a short run's time, so one process a rank loads it once and waits. For every
run it forks a child that goes through `megatron_bvpo.cli` as a rank (or the launching process) does, with
its own environment, output files and exit code. The waiting processes never compute, so they have no
threads, and forking them is safe.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.cells import ROOT
from tests.distributed.fork_worker import READY


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        codes: exit code of each rank, negative for a signal.
        stdout, stderr: what each rank wrote.
        folder: its --output_dir.
    """

    codes: list[int]
    stdout: list[str]
    stderr: list[str]
    folder: Path

    @property
    def text(self) -> str:
        return "".join(self.stdout + self.stderr)

    def require_success(self) -> Run:
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n" + "\n".join(
            f"--- rank {i} ---\n{text[-3000:]}" for i, text in enumerate(self.stderr)
        )
        assert "Canary:" not in self.text
        return self


class Zygotes:
    """The waiting processes, one a rank."""

    def __init__(self, ranks: int):
        env = {**os.environ, "BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.distributed.fork_worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen(command, env=env, cwd=ROOT, **pipes) for _ in range(ranks)]
        for process in self.processes:
            answer = process.stdout.readline().strip()
            assert answer == READY, f"a waiting process did not start: {answer}"

    def run(
        self,
        folder: Path,
        argv: list[str],
        *,
        ranks: int = 1,
        hook: str | None = None,
        hook_args: dict | None = None,
        env: dict[str, str] | None = None,
        launcher: bool = False,
        timeout: int = 900,
    ) -> Run:
        """Run `rlhf *argv`.

        Args:
            folder: --output_dir, if `argv` has no other; beside it are the outputs, in `<folder>.out`.
            argv: the flags.
            ranks: processes of the run.
            hook: `module:function` called with the trainer class and the folder; returns the class to use.
            env: added to the environment; WORLD_SIZE may claim ranks that do not exist.
            launcher: go the launching process's way (which starts torchrun) instead of a rank's.
            timeout: seconds, after which a child is ended by SIGALRM.
        """
        outputs = Path(f"{folder}.out")
        outputs.mkdir(parents=True, exist_ok=True)
        for old in outputs.iterdir():
            old.unlink()
        for rank, process in enumerate(self.processes[:ranks]):
            job = {
                "argv": ["--output_dir", str(folder), *argv],
                "hook": hook,
                "hook_args": hook_args or {},
                "env": {**_rank_environment(rank, ranks), **(env or {})} if not launcher else env or {},
                "launcher": launcher,
                "timeout": timeout,
                "outputs": str(outputs),
                "rank": rank,
                "folder": str(folder),
            }
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        codes = [int(process.stdout.readline()) for process in self.processes[:ranks]]
        texts = [
            [(outputs / f"{kind}{rank}").read_text(errors="replace") for rank in range(ranks)]
            for kind in ("stdout", "stderr")
        ]
        return Run(codes, *texts, Path(folder))

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait()


def _rank_environment(rank: int, ranks: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
    }


@functools.cache
def zygotes() -> Zygotes:
    """The two waiting processes of this test session."""
    made = Zygotes(2)
    atexit.register(made.close)
    return made
