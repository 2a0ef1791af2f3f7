"""Run a function on several gloo ranks of this machine.

    def body(rank, world_size, scale):
        x = torch.ones(1) * scale
        dist.all_reduce(x)
        return x

    results = run_ranks(2, body, 3.0)   # [tensor([6.]), tensor([6.])]

`body` and its arguments and result are pickled: define it at the top of a module.
"""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankError(RuntimeError):
    """Ranks raised or died; the message holds their numbers and tracebacks."""


def run_ranks(world_size: int, function, *args, timeout_s: float = 120.0, before=None) -> list:
    """Call `function(rank, world_size, *args)` on `world_size` fresh processes joined in a gloo group.

    Args:
        timeout_s: seconds for everything, the start of the processes included.
        before: called first in each process, before the group exists (for example rehearsal.install).

    Returns:
        what each rank returned, in rank order; tensors come back as they were, on the CPU.

    Raises:
        RankError: a rank raised or died; the other ranks are stopped.
        TimeoutError: some ranks had not answered after `timeout_s`.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    # The ranks meet over a file: no TCP port to choose, so none to lose to another run.
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        meeting = f"file://{folder}/store"
        processes = []
        before_spawn = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited; torch reads it when it is imported
        try:
            for rank in range(world_size):
                job = (rank, world_size, meeting, timeout_s, before, function, args, results)
                process = context.Process(target=_rank_main, args=job, daemon=True)
                process.start()
                processes.append(process)
        finally:
            if before_spawn is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before_spawn
        try:
            return _collect(processes, results, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                process.join(10)


def _collect(processes, results, timeout_s: float) -> list:
    answers, raised, deadline = {}, {}, time.monotonic() + timeout_s
    while len(answers) < len(processes):
        missing = [rank for rank in range(len(processes)) if rank not in answers]
        if time.monotonic() > deadline:
            if raised:
                raise RankError(_what_went_wrong(processes, raised))
            raise TimeoutError(f"ranks {missing} of {len(processes)} had not answered after {timeout_s} s.")
        try:
            rank, failed, answer = results.get(timeout=0.2)
        except queue.Empty:
            if results.empty() and any(processes[rank].exitcode not in (None, 0) for rank in missing):
                raise RankError(_what_went_wrong(processes, raised)) from None
            continue
        if not failed:
            answers[rank] = _restore(pickle.loads(answer))
            continue
        raised[rank] = answer
        # One failure makes others, and the first to be told need not be the cause: hear them all.
        deadline = min(deadline, time.monotonic() + 2.0)
    return [answers[rank] for rank in range(len(processes))]


def _what_went_wrong(processes, raised: dict[int, str]) -> str:
    """Ranks that died without a word first: they are the likelier cause."""
    count = len(processes)
    silent = [
        f"rank {rank} of {count} died with exit code {process.exitcode}."
        for rank, process in enumerate(processes)
        if process.exitcode not in (None, 0) and rank not in raised
    ]
    return "\n".join([*silent, *(f"rank {rank} of {count} raised:\n{text}" for rank, text in raised.items())])


def _rank_main(rank, world_size, meeting, timeout_s, before, function, args, results) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
        )
        if before is not None:
            before()
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        answer = function(rank, world_size, *args)
        results.put((rank, False, pickle.dumps(_portable(answer))))  # here, so that a failure is reported
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, True, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


class _Array:
    """A tensor as bytes: torch's own way shares memory with a process that may be gone when it is read."""

    def __init__(self, tensor):
        tensor = tensor.detach().cpu().contiguous()
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self.data = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""

    def tensor(self):
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).reshape(self.shape)


def _map(value, leaf_type, convert):
    if isinstance(value, leaf_type):
        return convert(value)
    if isinstance(value, dict):
        return {key: _map(item, leaf_type, convert) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(item, leaf_type, convert) for item in value)
    return value


def _portable(value):
    return _map(value, torch.Tensor, _Array)


def _restore(value):
    return _map(value, _Array, _Array.tensor)
