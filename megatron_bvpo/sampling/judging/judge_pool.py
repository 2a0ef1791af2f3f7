"""A function of one item in processes of its own, each item with a time limit that is kept.

A sympy that never returns does not hear an exception, so a process that is over its limit is killed and another takes
its place. Each process holds one item at a time: the others' clocks start when they are handed over, and what stands in
the queue behind a hanging item goes to the other processes.

On a machine with more to do than cores, a process that computes is given its limit in processor time, so that verdicts
do not depend on what else runs there; one that waits (all its threads asleep, for a network) has it by the clock. The
kernel ends a process whose parent is gone (`judge_worker`).
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bvpo.errors import UserError

START_LIMIT_S = 300.0
STARTS_IN_A_ROW = 3
LONGEST_WAIT = 100  # limits by the clock, for a process that does not get its processor time


class Outcome(NamedTuple):
    """What became of one item: the function's value, or why there is none."""

    value: Any
    error: str | None
    seconds: float


@dataclass
class _Worker:
    process: subprocess.Popen
    pipe: Connection
    ready: bool = False
    began: float = field(default_factory=time.monotonic)
    until: float = field(default_factory=lambda: time.monotonic() + START_LIMIT_S)
    processor_s: float = 0.0  # that it had used before its item
    job: tuple[Any, Any] | None = None  # key, payload
    ending: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """Again, or in two threads at once, it does nothing more."""
        with self.ending:
            self.process.kill()
            self.process.wait()
            self.pipe.close()


class JudgePool:
    """Processes that each hold one function.

    Args:
        function: `package.module:function`, called in a process with one payload; what it returns must pickle.
        arguments: told to the module's `prepare(**arguments)` first, where it has one.
        workers: how many processes.
        time_limit: seconds that one item may take.
        memory_gib: address space of a process; 0 for no limit.

    Raises:
        UserError: the function cannot be loaded.
    """

    def __init__(
        self, function: str, arguments: dict[str, Any], workers: int, time_limit: float, memory_gib: float = 0
    ) -> None:
        self.function, self.arguments = function, arguments
        self.time_limit, self.memory_gib = time_limit, memory_gib
        self._failed_starts = 0
        self._closed = False
        self._workers = [self._start()]
        try:
            # One is asked whether it can be loaded; the others then start beside the first items.
            wait([self._workers[0].pipe], START_LIMIT_S)
            self._read(self._workers[0], {})
            if not self._workers[0].ready:
                raise UserError(f"{function} was not loaded within {START_LIMIT_S:.0f} s", field="--with")
        except BaseException:
            self.close()
            raise
        self._workers += [self._start() for _ in range(workers - 1)]

    def close(self) -> None:
        """End the processes; a `run` of another thread ends, too."""
        self._closed = True
        for worker in self._workers:
            worker.end()
        self._workers = []

    def run(self, jobs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Outcome]]:
        """Hand (key, payload) out as processes are free; yields (key, `Outcome`) as they come."""
        jobs = iter(jobs)
        more = True
        try:
            while True:
                for worker in self._workers:
                    if more and worker.ready and worker.job is None:
                        job = next(jobs, None)
                        more = job is not None
                        if more:
                            self._hand_over(worker, job)
                if not more and all(worker.job is None for worker in self._workers):
                    return
                yield from self._wait()
        finally:
            # A caller that stops listening leaves no answer behind that the next one would take for its own.
            for worker in [worker for worker in self._workers if worker.job]:
                self._replace(worker)

    def _start(self) -> _Worker:
        if self._closed:
            raise RuntimeError("the pool is closed")
        ours, theirs = Pipe()
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), root) if part)
        # -c and no -m: the module must not be there twice, as __main__ and under its name.
        code = f"from megatron_bvpo.sampling.judging.judge_worker import main; main({theirs.fileno()})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a judge prints must not stand in our output
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        worker = _Worker(process, ours)
        ours.send((self.function, self.arguments, self.time_limit, self.memory_gib, os.getpid()))
        return worker

    def _hand_over(self, worker: _Worker, job: tuple[Any, Any]) -> None:
        worker.job, worker.began = job, time.monotonic()
        worker.until = worker.began + self.time_limit
        try:
            worker.pipe.send(job[1])
        except OSError:
            pass  # it died while it waited: its end is read next

    def _wait(self) -> Iterator[tuple[Any, Outcome]]:
        """Until something is heard or a limit is over."""
        now = time.monotonic()
        limits = [worker.until - now for worker in self._workers if worker.job or not worker.ready]
        heard = wait([worker.pipe for worker in self._workers], max(0.0, min(limits, default=1.0)))
        done: dict[Any, Outcome] = {}
        for worker in list(self._workers):
            if worker.pipe in heard:
                self._read(worker, done)
            elif time.monotonic() >= worker.until and (worker.job or not worker.ready) and not self._starved(worker):
                self._over(worker, done, self._late())
        yield from done.items()

    def _late(self) -> str:
        return f"no verdict within {self.time_limit:g} s"

    def _starved(self, worker: _Worker) -> bool:
        """Whether it computes and has not had its limit in processor time; it is given what is missing."""
        import psutil

        if worker.job is None or time.monotonic() > worker.began + LONGEST_WAIT * self.time_limit:
            return False
        try:
            process = psutil.Process(worker.process.pid)
            waits = not _computes(process)
            times = process.cpu_times()
        except psutil.Error:
            return False
        missing = self.time_limit - (times.user + times.system - worker.processor_s)
        worker.until = time.monotonic() + max(0.05, missing)
        return missing > 0 and not waits

    def _read(self, worker: _Worker, done: dict[Any, Outcome]) -> None:
        try:
            value, error, worker.processor_s = worker.pipe.recv()
        except (EOFError, OSError):
            code = worker.process.wait()
            late = code == -signal.SIGPROF  # its own alarm, while this process stood still
            self._over(worker, done, self._late() if late else f"the judge's process died ({_how(code)})")
            return
        if worker.job is not None:
            done[worker.job[0]] = Outcome(value, error, time.monotonic() - worker.began)
            worker.job = None
        elif error is not None:
            raise UserError(error, field="--with")
        else:
            worker.ready, self._failed_starts = True, 0

    def _over(self, worker: _Worker, done: dict[Any, Outcome], error: str) -> None:
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS_IN_A_ROW:
                raise UserError(f"{self.function} cannot be loaded: {error}", field="--with")
        if worker.job is not None:
            done[worker.job[0]] = Outcome(None, error, time.monotonic() - worker.began)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = self._start()


def _computes(process: Any) -> bool:
    """Whether any thread of a psutil.Process runs or reads a disk.

    The first alone will not do: it sleeps while another has the interpreter's lock, long on a busy machine.
    """
    import psutil

    for thread in process.threads():
        with suppress(psutil.Error):  # it ended just now
            # On Linux a thread has a process's files.
            if psutil.Process(thread.id).status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP):
                return True
    return False


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
