"""`bvpo doctor --report`: one text file about a machine, a run and its logs, to send to who is asked for help.

Nothing secret is in it: of the environment only variables that are known to matter are listed, and the whole text goes
through secret_masks.py. Every section is written as soon as it is known, so that one that fails or hangs costs itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.plan_check import BVPO, plan_command
from megatron_bvpo.cluster.run_folder import run_folder
from megatron_bvpo.cluster.run_logs import error_line
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import doctor
from megatron_bvpo.launching.run_file import RunFile, read_run
from megatron_bvpo.launching.secret_masks import known_secrets, masked

DEFAULT_FILE = "bvpo-report.txt"
LINES = 60  # of the head and of the tail of a log
MOST_LOGS = 12
_TAIL_BYTES = 400_000
# Variables that decide how a run works. All others of the environment stay at home.
_ALLOWED = re.compile(
    r"(?:BVPO|NCCL|TORCH|PYTORCH|CUDA|CUBLAS|CUDNN|NVTE|NVIDIA|TRITON|GLOO|UCX|FI|IBV|OMP|MKL|PET|SLURM"
    r"|APPTAINER|SINGULARITY)_\w+"
    r"|NNODES|NODE_RANK|NPROC_PER_NODE|MASTER_(?:ADDR|PORT)|WORLD_SIZE|LD_LIBRARY_PATH|PATH|PYTHON\w+"
    r"|USE_\w+|HF_(?:HOME|HUB_\w+|DATASETS_\w+)|TRANSFORMERS_\w+|MODELSCOPE_(?:CACHE|OFFLINE)|MEGATRON_LM_PATH|TMPDIR"
)
_PACKAGES = re.compile(
    r"torch|triton|numpy|transformer[-_]engine|flash[-_]|causal[-_]conv1d|apex|nvidia[-_](?:nccl|cudnn|cublas)|deepspeed"
    r"|accelerate|tokenizers|safetensors|pyarrow|ms[-_]swift|mcore|megatron|peft|trl|datasets|qwen[-_]vl",
    re.IGNORECASE,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--report` and its options to the parser of `bvpo doctor`."""
    parser.add_argument(
        "--report",
        nargs="?",
        const=DEFAULT_FILE,
        metavar="FILE",
        help=f"write versions, plan, environment and log heads, without secrets, into one file ({DEFAULT_FILE})",
    )
    parser.add_argument("--run", dest="run_argv", metavar="RUN.yaml", help="the run that the report is about")
    parser.add_argument("--folder", metavar="RUN_FOLDER", help="where its logs are (default: as train.sh chooses it)")
    parser.add_argument("--log", action="append", default=[], metavar="FILE", help="another log, such as Slurm's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.report is None:
        for given, flag in ((args.run_argv, "--run"), (args.folder, "--folder"), (args.log, "--log")):
            if given:
                raise UserError("goes with --report", field=flag, remedy="add --report FILE")
        return doctor.run(args)
    return write_report(Path(args.report), args.run_argv, args.folder, args.log)


def write_report(file: Path, yaml: str | None, folder: str | None, logs: list[str]) -> int:
    """Write the report; returns 0. Raises UserError where the file cannot be written or the YAML cannot be read."""
    run_ = read_run([yaml]) if yaml else None
    secrets = known_secrets(os.environ, run_)
    where = Path(folder) if folder else run_folder(run_) if run_ else None
    try:
        with file.open("w", encoding="utf-8") as out:
            for title, section in sections(run_, where, [Path(log) for log in logs]):
                out.write(masked(f"==== {title}\n{_said(section)}\n\n", secrets))
                out.flush()
    except OSError as e:
        raise UserError(f"cannot be written ({e.strerror})", file=str(file), remedy="name another file") from None
    size = file.stat().st_size / 1024
    print(f"{file}: {size:.0f} KiB. Secrets are masked as far as their names and forms tell: look through it first")
    return 0


def sections(run_: RunFile | None, folder: Path | None, logs: list[Path]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Title and text of each section, the text made when it is asked for."""
    yield "this environment", _doctor
    yield "packages", _packages
    yield "machine", _machine
    yield "GPUs", lambda: _command(["nvidia-smi"])
    yield "links between GPUs", lambda: _command(["nvidia-smi", "topo", "-m"])
    yield "environment (variables that decide how a run works; no others)", _environment
    if run_ is not None:
        yield f"run: {run_.file}", lambda: Path(run_.file).read_text(encoding="utf-8", errors="replace")
        yield "plan", lambda: _plan(run_)
    for log in [*run_logs(folder), *logs]:
        yield f"log: {log}", lambda log=log: head_and_tail(log)
    if folder is not None and not run_logs(folder):
        yield "logs", lambda: f"none below {folder}; name them with --folder or --log"


def _said(section: Callable[[], str]) -> str:
    try:
        return section().rstrip()
    except Exception as e:  # a report about a broken machine: what is broken is part of it
        return f"failed: {type(e).__name__}: {e}"


def _doctor() -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        doctor.run(argparse.Namespace())
    return said.getvalue()


def _packages() -> str:
    found = {
        d.metadata["Name"]: d.version for d in metadata.distributions() if _PACKAGES.match(d.metadata["Name"] or "")
    }
    lines = [f"{name} {found[name]}" for name in sorted(found, key=str.lower)]
    import torch

    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() and torch.version.cuda else None
    lines.append(f"torch was built for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}")
    return "\n".join(lines)


def _machine() -> str:
    uname = platform.uname()
    memory = next((line for line in _text("/proc/meminfo").splitlines() if line.startswith("MemAvailable")), "")
    host = f"{uname.node}, {uname.system} {uname.release}, {os.cpu_count()} CPUs, {memory}"
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return f"{now}, {host}\nPython {sys.version}\n{_text('/proc/driver/nvidia/version')}"


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _environment() -> str:
    return "\n".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if _ALLOWED.fullmatch(name))


def _plan(run_: RunFile) -> str:
    def number(*names: str, default: int) -> int:
        return next((int(v) for n in names if (v := os.environ.get(n, "")).isdigit() and int(v)), default)

    nodes, gpus = number("NNODES", "SLURM_NNODES", default=1), number("NPROC_PER_NODE", "SLURM_GPUS_ON_NODE", default=8)
    job = Job(nodes=nodes, rank=0, address="", port=0, gpus=gpus, name="")
    command = plan_command(run_, job, None)
    return f"bvpo {' '.join(command)}\n" + _command([sys.executable, "-c", BVPO, *command], timeout=120)


def _command(command: list[str], timeout: float = 30) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace")
    except FileNotFoundError:
        return f"there is no {command[0]} here"
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer in {timeout:.0f} s"
    end = f"\nexit code {done.returncode}" if done.returncode else ""
    return f"{done.stdout}{done.stderr}{end}"


def run_logs(folder: Path | None) -> list[Path]:
    """The logs of the newest attempt that tell most: of ranks with an error, oldest first; of the first and last."""
    attempts = [a for a in (folder / "logs").glob("*") if a.is_dir()] if folder else []
    if not attempts:
        return []
    newest = max(attempts, key=lambda a: a.stat().st_mtime)
    files = sorted(f for f in newest.rglob("*.log") if f.stat().st_size)
    failed = sorted((f for f in files if f.name == "stderr.log" and error_line(f)), key=lambda f: f.stat().st_mtime)
    chosen = [*failed[: MOST_LOGS - 4], *files[:2], *files[-2:]]
    return [*newest.glob("summary.json"), *dict.fromkeys(chosen)]


def head_and_tail(file: Path, count: int = LINES) -> str:
    """The first and the last `count` lines of a file of any size."""
    with file.open("rb") as stream:
        head = [stream.readline(4000).decode(errors="replace") for _ in range(count)]
        begun = stream.tell()
        size = stream.seek(0, os.SEEK_END)
        start = max(begun, size - _TAIL_BYTES)
        stream.seek(start)
        rest = stream.read().decode(errors="replace").splitlines(keepends=True)
    left = len(rest) - count
    gap = f"[… {start - begun:,} bytes and {max(left, 0)} lines are left out …]\n" if left > 0 or start > begun else ""
    return "".join(head) + gap + "".join(line[:4000] for line in rest[-count:])
