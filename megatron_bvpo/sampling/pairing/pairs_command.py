"""`bvpo pairs`: judged samples to preference rows, with a report."""

import argparse
from collections import Counter
from pathlib import Path

from megatron_bvpo.errors import UserError

REPORT = "report"


def add_command(commands) -> None:
    """Register `pairs` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "pairs",
        help="make preference rows of judged samples",
        description="Reads folders that bvpo sample filled and bvpo judge judged, and writes rows for training: a "
        "trace pair from answers with thinking, an empty pair from those without. Says why prompts have no pair, and "
        "what to fear of the pairs.",
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folder of samples, or NAME=DIR")
    parser.add_argument("--out", metavar="FILE", required=True, help="where the rows go, as JSON lines")
    parser.add_argument("--judge", metavar="NAME", help="whose words count; needed where there are several")
    parser.add_argument(
        "--policy",
        choices=("right_wrong", "best_worst"),
        default="right_wrong",
        help="a right answer over a wrong one (default), or the highest score over the lowest",
    )
    parser.add_argument(
        "--rejected",
        choices=("random", "likely"),
        help="right_wrong: which wrong answer; likely: the one with the highest mean log-probability (default random)",
    )
    parser.add_argument("--margin", type=float, default=0.0, help="least difference of the two scores (default 0)")
    parser.add_argument("--max_pairs_per_prompt", type=int, default=1, metavar="K", help="of each mode (default 1)")
    parser.add_argument(
        "--match_length", action="store_true", help="choose pairs so that the shorter side is chosen in half of them"
    )
    parser.add_argument("--keep_truncated", action="store_true", help="use answers that reached the generation limit")
    parser.add_argument("--mix", nargs="+", metavar="NAME=SHARE", help="share of each folder, such as DS1=0.3 DS2=0.7")
    parser.add_argument("--heldout", metavar="SHARE|N", help="hold out this share of the prompts, or so many")
    parser.add_argument("--heldout_out", metavar="FILE", help="where they go (default OUT with _heldout in its name)")
    parser.add_argument("--exclude", nargs="+", metavar="FILE", help="evaluation files: prompts in them are dropped")
    parser.add_argument("--ngram", type=int, default=13, metavar="N", help="words in common that tell (default 13)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", metavar="DIR", help="where the report goes (default: beside OUT)")
    parser.add_argument("--overwrite", action="store_true", help="write over files that are there")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.data.whole_files import written_whole
    from megatron_bvpo.sampling.pairing.pairs_report import report_lines
    from megatron_bvpo.sampling.pairing.pairs_run import make_pairs

    plan = read_plan(args)
    out = plan.outputs["pairs"]
    folder = Path(args.report) if args.report else out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", file=str(folder), field="--report") from None
    outcome = make_pairs(plan)
    lines = report_lines(outcome)
    text, picture = folder / f"{out.stem}.{REPORT}.md", folder / f"{out.stem}.{REPORT}.png"
    try:
        from megatron_bvpo.sampling.pairing.pairs_picture import draw

        draw(outcome, picture)
        lines += ["", f"![the same in pictures]({picture.name})"]
    except ImportError as error:
        lines += ["", f"No picture: {error.name} is missing (pip install 'megatron-bvpo[rehearsal]')."]
    with written_whole(text) as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def read_plan(args: argparse.Namespace):
    """The options as one checked `PairsPlan`.

    Raises:
        UserError: one of them is of no use, or would write over a file.
    """
    from megatron_bvpo.sampling.pairing.pair_mixing import read_heldout, read_shares
    from megatron_bvpo.sampling.pairing.pairing import PairRules
    from megatron_bvpo.sampling.pairing.pairs_run import PairsPlan

    check_options(args)
    folders = named_folders(args.folders)
    shares = read_shares(args.mix, [folder.name for folder in folders]) if args.mix else None
    return PairsPlan(
        folders=folders,
        outputs=_outputs(args),
        judge=args.judge,
        rules=PairRules(
            policy=args.policy,
            rejected=args.rejected or "random",
            margin=args.margin,
            most=args.max_pairs_per_prompt,
            match_length=args.match_length,
            seed=args.seed,
        ),
        keep_truncated=args.keep_truncated,
        shares=shares,
        heldout=read_heldout(args.heldout) if args.heldout else None,
        exclude=tuple(args.exclude or ()),
        ngram=args.ngram,
    )


def check_options(args: argparse.Namespace) -> None:
    """What can be said before there are samples.

    Raises:
        UserError: an option is of no use, or out of range.
    """
    from megatron_bvpo.sampling.pairing.pair_mixing import read_heldout

    if args.policy == "best_worst" and args.rejected:
        remedy = "leave it out, or take --policy right_wrong"
        raise UserError("best_worst always rejects the lowest score", field="--rejected", remedy=remedy)
    for name, value, least in (
        ("--max_pairs_per_prompt", args.max_pairs_per_prompt, 1),
        ("--ngram", args.ngram, 2),
        ("--margin", args.margin, 0),
    ):
        if not value >= least:  # a NaN, too
            raise UserError(f"is {value}; expected {least} or more", field=name)
    if args.heldout_out and not args.heldout:
        raise UserError("nothing is held out", field="--heldout_out", remedy="add --heldout SHARE")
    if args.heldout:
        read_heldout(args.heldout)


def named_folders(given: list[str]):
    """Folders with the names that `--mix` knows them by: NAME=DIR, or the folder's own name.

    Raises:
        UserError: a folder is not there, or two have one name or are one.
    """
    from megatron_bvpo.sampling.pairing.sample_facts import Folder

    folders = []
    for entry in given:
        name, mark, path = "", "", entry
        if not Path(entry).exists() and "=" in entry:
            name, mark, path = entry.partition("=")
        if not Path(path).is_dir():
            raise UserError("no such folder", file=path, remedy="name a folder that bvpo sample filled")
        folders.append(Folder(name if mark else Path(path).resolve().name, Path(path)))
    counts = Counter(folder.name for folder in folders)
    for folder in folders:
        if counts[folder.name] > 1:
            remedy = f"give each a name of its own: NAME={folder.path}"
            raise UserError(f"two folders are called {folder.name!r}", file=str(folder.path), remedy=remedy)
    same = Counter(folder.path.resolve() for folder in folders)
    for folder in folders:
        if same[folder.path.resolve()] > 1:
            raise UserError("the folder is given twice", file=str(folder.path), remedy="name it once")
    return tuple(folders)


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    from megatron_bvpo.data.whole_files import require_new_file

    out = Path(args.out)
    outputs = {"pairs": out}
    if args.heldout:
        outputs["held-out"] = Path(args.heldout_out or out.with_name(f"{out.stem}_heldout{out.suffix}"))
    if len(set(outputs.values())) < len(outputs):
        raise UserError("both parts would go to one file", file=args.out, field="--heldout_out")
    for flag, path in zip(("--out", "--heldout_out"), outputs.values(), strict=False):
        require_new_file(path, flag, args.overwrite)
    if args.report and Path(args.report).exists() and not Path(args.report).is_dir():
        raise UserError("is no folder", file=args.report, field="--report", remedy="name a folder for the report")
    return outputs
