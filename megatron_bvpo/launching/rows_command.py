"""`bvpo rows`: the judgement of a run's local data files, or of any files, with neither a model nor ranks."""

import argparse
import json
import os
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import path_rules, start_checks
from megatron_bvpo.launching.run_file import read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets

# What is carried over beside the columns of the one form: where a row came from. Not `answer`: in some forms that is
# the response.
CARRIED = ("empty_accept_rate", "short_accept_rate", "prompt_id", "judge", "numbers", "folders")
_OURS = ("bvpo_source", "bvpo_verdict")
_RUNS = (".yaml", ".yml")


def add_command(commands) -> None:
    """Register `rows` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "rows",
        help="judge the rows of a run's data files, or of any files",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="bvpo rows RUN.yaml [--FLAG …]\n       bvpo rows FILE … [--out FILE] [--columns JSON] [--bvpo_empty …]",
        description="Prints which rows a run would keep, and why it would lose the others, as its log does. Lengths\n"
        "in tokens are known when a run encodes its rows. Exit code 2: a file would stop the run.\n\n"
        "RUN: a YAML file and flags, as for swift rlhf; read are the local files among dataset and val_dataset.\n"
        "FILE: .jsonl, .json, .csv, .parquet, .arrow, and folders of them. Further options of this form:\n"
        "  --out FILE          write the rows that are kept in one form, as JSON lines\n"
        "  --overwrite         over a file that is there\n"
        "  --columns JSON      the file's column names to ms-swift's, as for a run\n"
        "  --bvpo_empty WHAT   strip (default), require or own, as for a run\n"
        "  --bvpo_alpha α      as for a run: 0 asks for no traces, 1 for no empty pairs\n"
        "  --bvpo_streams …    as for a run: trace empty (default), short, expert\n"
        "  --loss_type kto     as for a run: single responses with a label; also apo_zero_unpaired\n"
        "  --bvpo_gate hpt     as for a run; --bvpo_gate_threshold SHARE (default 0)",
    )
    parser.add_argument("given", metavar="RUN|FILE", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    given = [item for item in args.given if item != "--"]
    lines = _of_run(given) if _is_run(given) else _of_files(given)
    print("\n".join(lines))
    return 0


def _is_run(given: list[str]) -> bool:
    """Flags, or a YAML file first. A .json file is rows, unless it is a run's: one object with a `dataset`."""
    if not given or given[0].startswith("--") or given[0].endswith(_RUNS):
        return not (given and given[0] in ("--out", "--overwrite", "--columns"))
    if not given[0].endswith(".json"):
        return False
    try:
        if os.path.getsize(given[0]) > 1 << 20:
            return False
        found = json.loads(Path(given[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "dataset" in found


def _of_run(given: list[str]) -> list[str]:
    run = read_run(given)
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
    return lines


# --- files ---


def _of_files(given: list[str]) -> list[str]:
    from megatron_bvpo.data.handover import FileReport, Reading, judged_rows
    from megatron_bvpo.data.scan import ScanReport
    from megatron_bvpo.data.verdicts import require_rows
    from megatron_bvpo.data.whole_files import require_new_file, written_whole
    from megatron_bvpo.launching.stream_flags import rules_of_command

    args = _file_options(given)
    reading = Reading(rules_of_command(given), start_checks.read_columns(args.columns))
    report = ScanReport()
    rows = (
        row
        for path in _files(args.files)
        for row in judged_rows(path, reading, report.files.setdefault(path, FileReport()), CARRIED)
    )
    if args.out is None:
        for _ in rows:
            pass
        require_rows(report.tally, list(report.files))
        return report.lines()
    out = Path(args.out)
    require_new_file(out, "--out", args.overwrite)
    with written_whole(out) as file:
        for row in rows:
            kept = {name: value for name, value in row.items() if value is not None and name not in _OURS}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        require_rows(report.tally, list(report.files))
    return [*report.lines(), f"{out}: {report.tally.kept} rows in one form."]


class _Options(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message, field="bvpo rows FILE", remedy="bvpo rows --help says what there is")


def _file_options(given: list[str]) -> argparse.Namespace:
    parser = _Options(prog="bvpo rows", add_help=False, allow_abbrev=False)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--columns", default="{}")
    for name in ("--bvpo_empty", "--bvpo_alpha", "--bvpo_gate", "--bvpo_gate_threshold", "--loss_type"):
        parser.add_argument(name)
    parser.add_argument("--bvpo_streams", nargs="+")
    return parser.parse_args(given)


def _files(given: list[str]) -> list[str]:
    """The files, and those in the folders, each once."""
    from megatron_bvpo.data.scan import READ_HERE, nearby

    found: list[str] = []
    for path in given:
        if os.path.isdir(path):
            if os.path.isfile(os.path.join(path, "prompts.parquet")):
                remedy = f"make rows of it: bvpo pairs {path} --out pairs.jsonl"
                raise UserError("is a folder of samples, not of rows", file=path, remedy=remedy)
            inside = [
                os.path.join(folder, name)
                for folder, _, names in sorted(os.walk(path))
                for name in sorted(names)
                if name.endswith(READ_HERE) and not name.startswith(".")
            ]
            if not inside:
                remedy = f"name one with files that end in one of {', '.join(READ_HERE)}"
                raise UserError("no data file in this folder", file=path, remedy=remedy)
            found += inside
            continue
        if not os.path.exists(path):
            raise UserError("no such file", file=path, remedy=nearby(path))
        if not path.endswith(READ_HERE):
            remedy = f"name one that ends in {', '.join(READ_HERE)}, or a folder of them"
            raise UserError("is no data file by its name", file=path, remedy=remedy)
        found.append(path)
    return list(dict.fromkeys(found))
