"""Runs the preflight's ranks on this node and reads what they found (link_worker.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_bvpo.cluster.nodes import Job, network_defaults

PHASES = ("nothing", "started", "computed", "joined", "within", "pair", "across", "done")
# What NCCL writes into its log about the way between nodes, such as "[send] via NET/IB/0/GDRDMA".
_TRANSPORT = re.compile(r"via (NET/[A-Za-z]+)")
_NETWORK = re.compile(r"Using network (\w+)")


def run_links(job: Job, seconds: float, rehearsal: bool) -> dict[str, Any]:
    """One process a GPU, for at most `seconds`; returns their notes, NCCL's transports and what is on stderr.

    Returns:
        {"ranks": {local rank: [notes]}, "networks": [...], "transports": [...], "stderr": {local rank: last line}}
    """
    with tempfile.TemporaryDirectory(prefix="bvpo-links-") as folder:
        home = Path(folder)
        workers = [_start(job, local, home, seconds, rehearsal) for local in range(job.gpus)]
        deadline = time.monotonic() + seconds
        try:
            while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
            for worker in workers:
                worker.wait()
        logs = "".join(file.read_text(errors="replace") for file in home.glob("nccl.*"))
        return {
            "ranks": {str(local): _notes(home / f"notes{local}") for local in range(job.gpus)},
            "networks": sorted(set(_NETWORK.findall(logs))),
            "transports": sorted(set(_TRANSPORT.findall(logs))),
            "stderr": {str(local): _last_line(home / f"stderr{local}") for local in range(job.gpus)},
        }


def _start(job: Job, local: int, home: Path, seconds: float, rehearsal: bool) -> subprocess.Popen:
    env = {
        **os.environ,
        **network_defaults(job, os.environ),
        "RANK": str(job.rank * job.gpus + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.gpus),
        "MASTER_ADDR": job.address,
        "MASTER_PORT": str(job.port),
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # no dumps of a test
        "TORCH_NCCL_BLOCKING_WAIT": "1",  # a timeout raises in the rank, which then tries its next neighbour
    }
    # Outright: with a site's NCCL_DEBUG=WARN the log would not say which network is used.
    env["NCCL_DEBUG"], env["NCCL_DEBUG_SUBSYS"] = "INFO", "INIT,NET,GRAPH"
    env["NCCL_DEBUG_FILE"] = str(home / f"nccl.{local}")
    if rehearsal:
        env["BVPO_REHEARSAL"] = "1"
    with open(home / f"stderr{local}", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_bvpo.cluster.link_worker", str(home / f"notes{local}"), str(seconds)],
            env=env,
            stdout=stderr,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
        )


def _notes(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _last_line(file: Path) -> str:
    """The last line that a rank wrote, without NCCL's and Python's prefixes of many lines."""
    try:
        lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1][-300:] if lines else ""


def furthest(notes: list[dict[str, Any]]) -> str:
    """The last phase that a rank finished."""
    reached = [n["phase"] for n in notes if n["phase"] in PHASES]
    return max(reached, key=PHASES.index, default="nothing")
