"""The file that runs in each rank of a BVPO run, and the `bvpo` command.

A rank: put the CPU stand-ins in place if a rehearsal is wanted, check versions and device, check the flags,
then run the pipeline. User errors end as one line on stderr and exit code 2.

`python -m megatron_bvpo.cli rlhf …` is `megatron rlhf …` where the package is on the path but not installed.
"""

import os
import sys

if __name__ == "__main__":
    # Python put this file's folder first on the path, where `data`, `kernels` and `rehearsal` would hide
    # packages of those names. The folder above goes last, for a checkout that is not installed.
    _here = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0]) == _here:
        del sys.path[0]
    sys.path.append(os.path.dirname(_here))

if __name__ == "__mp_main__" and os.environ.get("BVPO_REHEARSAL") == "1":
    # A worker that multiprocessing spawned (packing, checkpoints): it imports this file again and does no
    # more than put the stand-ins in place for itself.
    from megatron_bvpo.rehearsal import install

    install()


def run_rank(argv: list[str]) -> None:
    """Run one rank with unrolled flags. Ends the process on a user error."""
    from megatron_bvpo.errors import UserError
    from megatron_bvpo.launching import argv as flags
    from megatron_bvpo.launching import error_output, start_checks
    from megatron_bvpo.launching.rivals import settle
    from megatron_bvpo.launching.run_file import RunFile
    from megatron_bvpo.launching.secret_flags import refuse_secrets

    _, argv = flags.take_megatron(argv)
    sys.argv[1:] = argv
    ours = flags.rlhf_type(argv) == "bvpo"
    try:
        if ours:
            # Once more, for ranks that torchrun started without our launcher.
            refuse_secrets(RunFile(tuple(argv), tuple(argv), {}, None), dict(os.environ))
            settle({}, flags.all_values(argv))
            start_checks.check(argv)
        if flags.rehearsal_requested() or (ours and start_checks.help_without_engine(argv)):
            from megatron_bvpo.rehearsal import install

            install()
        if ours:
            _run_bvpo(argv)
        else:
            _run_stock()
    except UserError as error:
        error_output.leave(error)


def _run_bvpo(argv: list[str]) -> None:
    from megatron_bvpo.launching import argv as flags

    if flags.wants_help(argv) and os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one rank per node prints it
    # As ms-swift's own Megatron commands set it, before CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # The pipeline comes first: ms-swift's Megatron modules import in one order only.
    from megatron_bvpo.training.pipeline import bvpo_main
    from megatron_bvpo.training.arguments import BvpoArguments  # isort: skip
    from megatron_bvpo.launching.flags import check_flags

    check_flags(BvpoArguments, argv)
    bvpo_main()


def _run_stock() -> None:
    """Run the file behind `megatron rlhf` as it would run by itself."""
    import runpy

    runpy.run_module("swift.cli._megatron.rlhf", run_name="__main__")


def launch(argv: list[str]) -> None:
    """`rlhf …` in the launching process: what `megatron rlhf …` does where the route is installed."""
    import swift.cli.main as swift_main
    from swift.cli._megatron.main import ROUTE_MAPPING

    from megatron_bvpo.launching.route import run_rlhf

    sys.argv[1:] = argv
    original = getattr(swift_main.cli_main, "__wrapped__", swift_main.cli_main)
    run_rlhf(swift_main, original, ROUTE_MAPPING, is_megatron=True)


def bvpo(argv: list[str] | None = None) -> int:
    """The `bvpo` command. Returns its exit code."""
    import argparse

    import megatron_bvpo
    from megatron_bvpo.cluster import node_preflight, supervise, support_report
    from megatron_bvpo.errors import EXIT_CODE, UserError
    from megatron_bvpo.evaluation import compare_command, eval_command
    from megatron_bvpo.export import export_command
    from megatron_bvpo.growth import expand_command
    from megatron_bvpo.launching import doctor, error_output, rows_command
    from megatron_bvpo.planning import command as plan
    from megatron_bvpo.reporting import run_report
    from megatron_bvpo.sampling.asking import sample_command
    from megatron_bvpo.sampling.judging import judge_command
    from megatron_bvpo.sampling.pairing import pairs_command
    from megatron_bvpo.workflow import rounds_command, sweep_command

    parser = argparse.ArgumentParser(prog="bvpo", description="Tools around BVPO training with ms-swift.")
    parser.add_argument("--version", action="version", version=f"megatron-bvpo {megatron_bvpo.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    support_report.add_options(doctor.add_command(commands))
    run_report.add_command(commands)
    rows_command.add_command(commands)
    sample_command.add_command(commands)
    judge_command.add_command(commands)
    pairs_command.add_command(commands)
    eval_command.add_command(commands)
    compare_command.add_command(commands)
    export_command.add_command(commands)
    expand_command.add_command(commands)
    plan.add_command(commands)
    sweep_command.add_command(commands)
    rounds_command.add_command(commands)
    node_preflight.add_command(commands)
    supervise.add_command(commands)
    refs = commands.add_parser(
        "refs",
        help="write the reference log-probs of a run's rows, and train nothing",
        description="Takes what `swift rlhf` takes (run.yaml, --flags) and starts the same ranks. --bvpo_ref_cache "
        "names the folder; runs on the same rows that name it then skip the reference forward.",
        add_help=False,
    )
    refs.set_defaults(run=write_references)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["sample"]:
        try:
            argv = sample_command.with_job_file(argv)
        except UserError as error:
            error_output.write(error)
            return EXIT_CODE
    # What follows `refs` belongs to ms-swift's parser.
    args, rest = (parser.parse_args(["refs"]), argv[1:]) if argv[:1] == ["refs"] else (parser.parse_args(argv), [])
    args.rest = rest
    try:
        return args.run(args) or 0
    except UserError as error:
        error_output.write(error)
        return EXIT_CODE


def write_references(args) -> None:
    """`bvpo refs …`: the run that `swift rlhf …` would start, without its training."""
    launch(["rlhf", *args.rest, "--rlhf_type", "bvpo", "--bvpo_refs_only", "true"])


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["rlhf"]:
        launch(argv)
    else:
        run_rank(argv)


if __name__ == "__main__":
    main()
