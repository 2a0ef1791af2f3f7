"""benchmarks/gpu.sh                         # ten minutes on one GPU; lines to $OUT/gpu.jsonl, log to $OUT/gpu.log
benchmarks/gpu.sh --only stack            # some phases; what is in the file is skipped
benchmarks/gpu.sh --again stack/          # measure again what begins so
benchmarks/gpu.sh --tiny --out /tmp/out   # rehearse anywhere: the same path at sizes that mean nothing
benchmarks/gpu.sh --table out/gpu.jsonl   # the tables of a file, anywhere
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import os
import sys
import uuid
from pathlib import Path

from benchmarks.gpu import machine
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.plan import whole_plan
from benchmarks.gpu.run import Run
from benchmarks.gpu.tables import tables


def main() -> int:
    options = arguments()
    if options.table:
        print(tables(Lines(options.table).read()))
        return 0
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "gpu.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"error: another start writes to {folder}; wait for it, or give another --out", file=sys.stderr)
        return 2
    lines, name = Lines(folder / "gpu.jsonl"), machine.name(options.tiny)
    run_id = uuid.uuid4().hex[:8]
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines.append({"run": run_id, "started": started, "on": name, "budget_s": options.seconds, **machine.about()})
    phases = [phase for phase in whole_plan(options.tiny) if not options.only or phase.name in options.only]
    if options.again:
        forget(lines, name, options.again)
    left = Run(phases, lines, folder / "gpu.log", name, {"run": run_id}, options.seconds)()
    print(tables(lines.read()))
    for figure in left:
        print(f"not measured: {figure.key}")
    failed = [key for key, line in lines.figures(name).items() if "failed" in line or line.get("failures")]
    print(f"{len(lines.figures(name))} figures, {len(left)} not measured, {len(failed)} with failures: {failed}")
    return 1 if left else 0


def forget(lines: Lines, name: str, prefixes: list[str]) -> None:
    """Nothing is deleted: a line that says "again" takes the place of the figure until it is measured."""
    for key in list(lines.figures(name)):
        if key.startswith(tuple(prefixes)):
            lines.append({"key": key, "on": name, "again": True})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [phase.name for phase in whole_plan(tiny=False)]
    parser.add_argument("--seconds", type=float, default=540, help="the budget (540)")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT"), help="folder of gpu.jsonl and gpu.log ($OUT)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="PHASE", help=f"some of: {', '.join(names)}")
    parser.add_argument("--again", nargs="+", metavar="PREFIX", help="figures to measure again")
    parser.add_argument("--tiny", action="store_true", help="rehearse at sizes that run anywhere")
    parser.add_argument("--table", type=Path, help="print the tables of this file and end")
    options = parser.parse_args()
    if options.table and not options.table.is_file():
        parser.error(f"--table {options.table}: no such file; give the gpu.jsonl of a run")
    if not options.table and options.out is None:
        parser.error("no place for the figures: give --out FOLDER, or set OUT")
    if not options.table and not options.tiny and machine.smi("name") is None:
        parser.error("no GPU answers (nvidia-smi): these are GPU figures; --tiny rehearses without one")
    options.out = Path(options.out) if options.out else None
    return options


if __name__ == "__main__":
    sys.exit(main())
