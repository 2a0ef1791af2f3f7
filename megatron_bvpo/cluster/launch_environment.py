"""The environment and command line of a run: every default that a multi-node job needs, and no more than that."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_bvpo.cluster.nodes import Job, network_defaults
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.run_file import RunFile

# Seconds that nodes wait for node 0's torchrun, which starts when node 0 has read the data files. torch's own 600 are
# too few for many of them; a node that is gone is noticed by the roll call long before.
MEETING_S = 4 * 3600
# Where the rows of the run are kept for all nodes and for its next starts (data/shared_cache.py).
DATA_CACHE, DATA_FOLDER = "BVPO_DATA_CACHE", "data-cache"


def log_folder(folder: Path, job: Job, env: Mapping[str, str] | None = None) -> Path:
    """`<run>/logs/<attempt>/<node>`; the attempt is the scheduler's, so that all nodes have the same."""
    env = os.environ if env is None else env
    attempt = env.get("BVPO_ATTEMPT") or "run"
    return folder / "logs" / attempt / f"{job.rank:03d}-{job.name}"


def flight_recorder_folder(logs: Path) -> Path:
    """`<run>/logs/<attempt>/flight-recorder`, of all nodes: torch's reader wants all ranks in one folder."""
    return logs.parent / "flight-recorder"


def data_cache(folder: Path, env: Mapping[str, str] | None = None) -> Path:
    """Where the rows are kept: BVPO_DATA_CACHE, else a folder in the run's folder, which all nodes share."""
    given = (os.environ if env is None else env).get(DATA_CACHE)
    return Path(os.path.abspath(os.path.expanduser(given or folder / DATA_FOLDER)))


def launch_environment(
    job: Job, run: RunFile, folder: Path, logs: Path, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What the run's processes get; what the site has set stays."""
    made = {**run.env, **(os.environ if env is None else env)}

    def default(name: str, value: str) -> None:
        if not made.get(name):
            made[name] = value

    made.update(
        NNODES=str(job.nodes),
        NODE_RANK=str(job.rank),
        MASTER_ADDR=job.address,
        MASTER_PORT=str(job.port),
        NPROC_PER_NODE=str(job.gpus),
    )
    default("BVPO_STOP_FILE", str(folder / "stop"))
    default("BVPO_RESUME", "auto")
    default("BVPO_NODE_SILENCE_S", "60")
    made[DATA_CACHE] = str(data_cache(folder, made))
    default("PET_RDZV_CONF", f"timeout={MEETING_S}")
    # ---- logs: a file a rank; on the screen the first rank (messages) and the last one (losses)
    made["PET_LOG_DIR"] = str(logs)
    made["PET_REDIRECTS"] = "3"
    shown = {0} if job.rank == 0 else set()
    if job.rank == job.nodes - 1:
        shown.add(job.gpus - 1)
    made["PET_TEE"] = ",".join(f"{local}:3" for local in sorted(shown)) or "0"
    # ---- NCCL's flight recorder: what every rank was doing when a collective timed out. The names that begin with
    # TORCH_FR are torch 2.13's; 2.11 and earlier know the others.
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        default(name, "20000")
    default("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        default(name, str(flight_recorder_folder(logs) / "rank-"))
    # ---- the usual needs of Megatron and of a read-only image
    default("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Micro-batches of many lengths fragment the allocator's blocks; segments that grow do not. torch 2.9 and later also
    # know it as PYTORCH_ALLOC_CONF.
    if not made.get("PYTORCH_ALLOC_CONF"):
        default("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    default("OMP_NUM_THREADS", "1")
    default("PYTHONUNBUFFERED", "1")
    made.update(network_defaults(job, made))
    if made["BVPO_RESUME"] not in ("auto", "never"):
        raise UserError(
            f"BVPO_RESUME is {made['BVPO_RESUME']!r}; expected auto or never",
            field="BVPO_RESUME",
            remedy="auto goes on from last-checkpoint where there is one",
        )
    try:
        if float(made["BVPO_NODE_SILENCE_S"]) <= 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"BVPO_NODE_SILENCE_S is {made['BVPO_NODE_SILENCE_S']!r}; expected seconds above 0",
            field="BVPO_NODE_SILENCE_S",
            remedy="unset it for 60",
        ) from None
    return made


def swift_command(run: RunFile, folder: Path, resume: list[str]) -> list[str]:
    """`swift rlhf` of this Python: the run as it was given, then what the launcher decides (the last flag wins)."""
    more = ["--output_dir", str(folder), "--add_version", "false", *resume]
    if not run.is_given("load_from_cache_file"):  # a start after another one finds its rows encoded
        more += ["--load_from_cache_file", "true"]
    if not run.is_given("rlhf_type"):
        more += ["--rlhf_type", "bvpo"]
    return [sys.executable, "-m", "megatron_bvpo.cli", "rlhf", *run.argv, *more]
