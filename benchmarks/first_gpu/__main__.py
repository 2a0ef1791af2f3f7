"""launch/first_gpu.sh                        # all GPUs of this node (8, 4 or 1), under 15 minutes
launch/first_gpu.sh --ranks 1              # one GPU
launch/first_gpu.sh --only fusion          # comparisons whose name begins so
launch/first_gpu.sh --cpu                  # rehearse: four CPU ranks and stand-ins against one rank

Start it again to go on: what has passed is not run again, what failed is. Lines are in first-gpu.jsonl, the table in
first-gpu.md, both in --out. Exit code 0: all passed; 1: something failed; 75: time was up.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.first_gpu import plan
from benchmarks.first_gpu.run import Run
from benchmarks.first_gpu.table import table

FAILED, TIME_IS_UP = 1, 75
_PREPARE = (
    "import sys; from pathlib import Path; from megatron_bvpo.rehearsal.prepare import prepare; "
    "prepare(Path(sys.argv[1]), n_train=16, n_held_out=4)"
)


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped, too
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"error: another start writes to {folder}; wait for it, or give another --out", file=sys.stderr)
        return 2
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", _PREPARE, str(folder / "data")], check=True, env=env)
    gpu = not options.cpu
    machine = f"{options.ranks} × {card()}" if gpu else f"{options.ranks} CPU ranks"
    comparisons = [c for c in plan.comparisons(gpu) if c.key.startswith(tuple(options.only or [""]))]
    run = Run(
        folder, machine, options.ranks,
        gpu=gpu, seconds=options.seconds, patience=options.patience, plant=dict(options.plant),
    )  # fmt: skip
    left = run(plan.groups(gpu), comparisons)
    found = {key: line for key, line in run.found().items() if key in {c.key for c in comparisons}}
    text = table(found, [c.key for c in comparisons], machine)
    (folder / "first-gpu.md").write_text(text)
    print(f"\n{text}")
    bad = [key for key, line in found.items() if not line["ok"]]
    print(f"{len(found) - len(bad)} of {len(comparisons)} passed or left out, {len(bad)} failed, {len(left)} not run")
    return FAILED if bad else TIME_IS_UP if left else 0


def gpus() -> list[str]:
    """The cards that nvidia-smi lists."""
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")] if done.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # nvidia-smi does not look at it
    return found if visible is None else found[: len([part for part in visible.split(",") if part.strip()])]


def card() -> str:
    return gpus()[0].split(": ", 1)[-1].split(" (UUID")[0]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/first_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="stand-ins and CPU ranks on both sides")
    parser.add_argument(
        "--ranks", type=int, choices=sorted(plan.LAYOUTS), help="(8, 4 or 1, as there are GPUs; CPU: 4)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("first-gpu"), help="folder of lines, table and log (first-gpu)"
    )
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="comparisons whose names begin so")
    parser.add_argument("--seconds", type=float, default=870, help="the budget (870)")
    parser.add_argument("--patience", type=float, help="a cell's limit over what it should take (3; with --cpu 20)")
    parser.add_argument(
        "--plant", nargs=2, action="append", default=[], metavar=("CELL", "FAULT"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    there = len(gpus())
    if not options.cpu and not there:
        parser.error("no GPU answers (nvidia-smi --list-gpus); --cpu rehearses without one")
    if options.ranks is None:
        options.ranks = 4 if options.cpu else max(n for n in plan.LAYOUTS if n <= there)
    if not options.cpu and options.ranks > there:
        parser.error(f"--ranks {options.ranks}: there are {there} GPUs")
    if options.patience is None:
        options.patience = 20.0 if options.cpu else 3.0
    options.plant = [(cell, float(fault)) for cell, fault in options.plant]
    return options


if __name__ == "__main__":
    sys.exit(main())
