"""`bvpo rounds`: sample, judge, pair, train, export, evaluate, and again from the model that came out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_command(commands) -> None:
    """Register `rounds` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "rounds",
        help="sample, judge, pair, train, export and evaluate, round after round",
        description="Each round answers with the model of the round before and trains it on its own answers. Every "
        "stage leaves files that let the next start skip it: stopped or killed at any moment and given again, the same "
        "command goes on. Exit code 4: a stage failed, and is named. docs/loop.md has an example.",
    )
    add = parser.add_argument
    add("rounds", metavar="ROUNDS.yaml", help="what to do, as in configs/rounds_235b.yaml")
    add("--out", metavar="DIR", help="the folder of all rounds (default: the file's out, else rounds/<its name>)")
    add("--dry-run", action="store_true", help="print stages, commands and GPU hours, and start nothing")
    add("--cores", type=int, metavar="N", help="ranks that may run here at a time (default: those of the training)")
    add("--graph", metavar="FILE", type=Path, help="draw the stages instead: .dot, .mmd, .svg, .png, .pdf")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.workflow.chain import run_chain
    from megatron_bvpo.workflow.rounds_file import read_rounds, require_files
    from megatron_bvpo.workflow.rounds_stages import stages_of

    rounds = read_rounds(args.rounds, args.out)
    stages = stages_of(rounds)
    if not (args.dry_run or args.graph):
        require_files(rounds)
    outcome = run_chain(stages, rounds.out, cores=args.cores, dry_run=args.dry_run, graph=args.graph)
    if args.graph:
        return 0
    if args.dry_run:
        from megatron_bvpo.workflow.rounds_costs import estimates

        print("\n".join(estimates(rounds)))
        return 0
    for line in verdict(rounds.out):
        print(line)
    return outcome.exit_code


def verdict(out: Path) -> list[str]:
    """What the comparison says, and where the page is; of a chain that has not come so far, nothing."""
    from megatron_bvpo.workflow.rounds_stages import COMPARED, PAGE

    lines = []
    if (out / COMPARED).is_file():
        lines += [one["sentence"] for one in json.loads((out / COMPARED).read_text(encoding="utf-8"))]
    if (out / PAGE).is_file():
        lines.append(f"Page: {out / PAGE}")
    return lines
