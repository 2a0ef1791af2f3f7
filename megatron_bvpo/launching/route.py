"""Where `swift rlhf` and `megatron rlhf` go. Runs in the launching process, before torchrun.

ms-swift's own `cli_main` still does the launching; it is only given another file to run:

    rlhf_type bvpo                     → megatron_bvpo/cli.py
    another type, --megatron           → the file behind `megatron rlhf`
    another type, `megatron rlhf`      → as without us
    another type, no --megatron        → as without us

In a rehearsal every Megatron run goes through megatron_bvpo/cli.py, which puts the CPU stand-ins in place.

An ordinary `swift rlhf` comes here too and must start as fast as without us: what only our own runs need is
imported where it is used.
"""

import os
import re
import sys
from pathlib import Path

from megatron_bvpo.errors import EXIT_CODE, UserError
from megatron_bvpo.launching import argv as flags
from megatron_bvpo.launching.run_file import RunFile, read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets

OURS = "megatron_bvpo.cli"


def choose(argv: list[str], is_megatron: bool, rehearsal: bool) -> tuple[str | None, list[str]]:
    """The route of an unrolled `rlhf` command: ("bvpo", "megatron" or None for as without us, arguments)."""
    megatron, rest = flags.take_megatron(argv)
    if flags.rlhf_type(rest) == "bvpo":
        if megatron is False:
            raise UserError(
                "--rlhf_type bvpo with --megatron false: BVPO runs on the Megatron backend only.",
                remedy="Leave --megatron out, or set it to true.",
            )
        if flags.is_true(rest, "use_ray"):
            raise UserError(
                "--rlhf_type bvpo with --use_ray: BVPO starts through torchrun only.",
                remedy="Leave --use_ray out and set NPROC_PER_NODE.",
            )
        return "bvpo", rest
    if is_megatron or megatron:
        return ("bvpo" if rehearsal else "megatron"), rest
    return None, rest


def check_before_unrolling(argv: list[str]) -> RunFile | None:
    """The run, if it is BVPO's; raise UserError where its file cannot be read or holds a secret, or has rivals.

    Of other runs only the type is looked at; what is wrong with their files, ms-swift says.

    Args:
        argv: the arguments after `rlhf`, a YAML or JSON file perhaps still first among them.
    """
    try:
        run = read_run(argv)
    except UserError:
        if flags.rlhf_type(argv) == "bvpo" or _speaks_of_bvpo(argv):
            raise
        return None
    if run.value("rlhf_type") != "bvpo":
        return None
    refuse_secrets(run, dict(os.environ))
    return run


def _speaks_of_bvpo(argv: list[str]) -> bool:
    """Whether the run's file, which is no YAML, is about BVPO all the same."""
    try:
        text = Path(argv[0]).read_bytes()
    except (IndexError, OSError):
        return False
    return re.search(rb"""^[\s"'{,]*rlhf_type["'\s]*:["'\s]*bvpo\b""", text, re.MULTILINE) is not None


def run_rlhf(swift_main, original, route_mapping=None, is_megatron: bool = False) -> None:
    """Stand in for ms-swift's `cli_main` when the subcommand is `rlhf`.

    Args:
        swift_main: the module `swift.cli.main`.
        original: its own `cli_main`.
        route_mapping, is_megatron: what `cli_main` was called with; `megatron` gives its own mapping.
    """
    argv = sys.argv[2:]
    scanned = None
    try:
        run = check_before_unrolling(argv)
        # ms-swift's own unrolling. It would come to it next, and then finds nothing left to unroll.
        swift_main.parse_yaml_args(argv)
        if run is not None:  # the same list, but for the file's keys that lose to the command line
            argv = list(run.flags)
            for note in run.notes:
                print(f"megatron-bvpo: {note}", flush=True)
        route, rest = choose(argv, is_megatron, flags.rehearsal_requested())
        sys.argv[2:] = rest
        if route is None or (route == "megatron" and is_megatron):
            return original(route_mapping, is_megatron)
        if route == "megatron":
            from swift.cli._megatron.main import ROUTE_MAPPING

            return original(ROUTE_MAPPING, is_megatron=True)
        if flags.rlhf_type(rest) == "bvpo":
            if not is_megatron and len(rest) == len(argv):
                print("megatron-bvpo: --rlhf_type bvpo runs on the Megatron backend.", flush=True)
            from megatron_bvpo.launching import start_checks

            start_checks.check(rest)
            scanned = start_checks.scan_data(rest)
    except UserError as error:
        from megatron_bvpo.launching import error_output

        error_output.write(error)
        sys.exit(EXIT_CODE)
    mapping = {**(route_mapping or swift_main.ROUTE_MAPPING), "rlhf": OURS}
    _launch(lambda: original(mapping, is_megatron=True), scanned)


def _launch(launch, scanned: list[str] | None) -> None:
    """Run `launch`; after a user error of a rank, end with its message last and its exit code.

    `scanned` is what the look through the data files found, for the log of rank 0.
    """
    import tempfile

    from megatron_bvpo.launching import error_output

    with tempfile.TemporaryDirectory(prefix="megatron-bvpo-") as name:
        os.environ[error_output.FOLDER] = name
        if scanned is not None:
            error_output.hand_over_scan(Path(name), scanned)
        code = 0
        try:
            launch()
        except SystemExit as stop:
            code = stop.code
        message = error_output.read(Path(name))
    if message is None and not code:
        return
    if message is None:
        sys.exit(code)
    if code not in (0, EXIT_CODE):  # torchrun has put its own words after ours
        print(message, file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)
