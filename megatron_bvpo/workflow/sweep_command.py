"""`bvpo sweep`: many runs from one file, on one reference cache, evaluated and compared."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

COMPARED, PAGE = "compare.txt", "sweep.html"


def add_command(commands) -> None:
    """Register `sweep` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "sweep",
        help="train, export and evaluate many runs from one file",
        description="Runs share one cache of reference log-probs and never a folder. A run that fails is named, and "
        "the others go on; stopped or killed at any moment and given again, the same command does only what is "
        "missing. Exit code 4: a stage failed. docs/sweep.md has an example.",
    )
    add = parser.add_argument
    add("sweep", metavar="SWEEP.yaml", help="what to do, as in configs/sweep_003.yaml")
    add("--out", metavar="DIR", help="the folder of the sweep (default: the file's out, else sweeps/<its name>)")
    add("--dry-run", action="store_true", help="print stages, commands and GPU hours, and start nothing")
    add("--cores", type=int, metavar="N", help="ranks that may run here at a time (default: those of one run)")
    add("--graph", metavar="FILE", type=Path, help="draw the stages instead: .dot, .mmd, .svg, .png, .pdf")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.workflow.chain import run_chain
    from megatron_bvpo.workflow.sweep_costs import costs_told
    from megatron_bvpo.workflow.sweep_file import read_sweep
    from megatron_bvpo.workflow.sweep_stages import require_models, stages_of

    sweep = read_sweep(args.sweep, args.out)
    if not (args.dry_run or args.graph):
        require_models(sweep)
    outcome = run_chain(stages_of(sweep), sweep.out, cores=args.cores, dry_run=args.dry_run, graph=args.graph)
    if args.dry_run and not args.graph:
        print("\n".join(costs_told(sweep)))
    elif not args.graph and not outcome.stopped_by:
        summarise(sweep)
    return 0 if args.dry_run or args.graph else outcome.exit_code


def summarise(sweep) -> None:
    """Compare and show what is there: runs that failed do not keep the others from it."""
    from megatron_bvpo.reporting.run_log import LOG
    from megatron_bvpo.workflow.sweep_file import BASE
    from megatron_bvpo.workflow.sweep_stages import run_folder

    names = ([BASE] if sweep.evaluation and sweep.evaluation.base else []) + [run.name for run in sweep.runs]
    folders = {name: run_folder(sweep, name) for name in names}
    scored = [name for name in names if (folders[name] / "eval" / "scores.json").is_file()]
    if len(scored) > 1:
        words = [f"{name}={folders[name] / 'eval'}" for name in scored]
        said = _bvpo("compare", *words, *(["--baseline", BASE] if BASE in scored else []))
        (sweep.out / COMPARED).write_text(said, encoding="utf-8")
        print(said, end="")
    shown = [str(folders[name]) for name in names if name in scored or (folders[name] / LOG).is_file()]
    if shown:
        _bvpo("report", *shown, "--html", str(sweep.out / PAGE))
        if (sweep.out / PAGE).is_file():
            print(f"Page: {sweep.out / PAGE}")


def _bvpo(*words: str) -> str:
    """What the command says; a page or a comparison that fails is told, and fails no run."""
    command = [sys.executable, "-m", "megatron_bvpo", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"bvpo {words[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return ""
    return done.stdout
