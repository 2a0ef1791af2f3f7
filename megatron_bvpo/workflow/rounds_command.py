"""`bvpo rounds`: sample, judge, pair, train, export, evaluate, and again from the model that came out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_bvpo.workflow.chain import Outcome
    from megatron_bvpo.workflow.rounds_file import Rounds


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
    for line in verdict(rounds, outcome):
        print(line)
    return outcome.exit_code


def verdict(rounds: Rounds, outcome: Outcome) -> list[str]:
    """What the comparison says, and where the page is; where they are of fewer rounds, which were asked for before,
    nothing."""
    from megatron_bvpo.workflow.records import State
    from megatron_bvpo.workflow.rounds_stages import COMPARED, PAGE

    def is_made(stage: str) -> bool:
        return outcome.states.get(f"{stage}/{rounds.rounds}") == State.DONE

    lines, compared = [], rounds.out / COMPARED
    if is_made("compare"):
        lines += [one["sentence"] for one in json.loads(compared.read_text(encoding="utf-8"))]
    if is_made("page"):
        lines.append(f"Page: {rounds.out / PAGE}")
    return lines
