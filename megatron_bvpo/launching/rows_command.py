"""`bvpo rows`: the judgement of a run's local data files, with neither a model nor ranks."""

import argparse
import os

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import path_rules, start_checks
from megatron_bvpo.launching.run_file import read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets


def add_command(commands) -> None:
    """Register `rows` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "rows",
        help="judge the rows of a run's data files",
        description="Prints which rows of the local files among dataset and val_dataset a run would keep, and why it "
        "would lose the others, as its log does. Lengths in tokens are known when a run encodes its rows. Exit code 2: "
        "a file would stop the run.",
    )
    parser.add_argument(
        "given", metavar="RUN", nargs=argparse.REMAINDER, help="the run: a YAML file and flags, as for swift rlhf"
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    run = read_run([item for item in args.given if item != "--"])
    refuse_secrets(run, dict(os.environ))
    flags = list(run.flags)
    for name in path_rules.DATA:
        path_rules.check_data(run.values(name), name)
    lines = start_checks.scan_data(flags)
    if lines is None:
        raise UserError(
            "nothing can be judged ahead: no local file is named, a flag is wrong, or plugins read the rows",
            field="--dataset",
            remedy="name files and no plugins; the run itself judges what it loads",
        )
    print("\n".join(lines))
    return 0
