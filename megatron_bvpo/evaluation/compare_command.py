"""`bvpo compare A B [C…]`: does one evaluation beat another, on the same questions?"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation.scores_file import SCORES


def add_command(commands) -> None:
    """Register `compare` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "compare",
        help="tell evaluations apart: paired differences with intervals",
        description="Reads the scores.json of two or more folders that bvpo eval filled, and says in a sentence for "
        "each dataset and mode which one is better and by how much, or what it would take to tell.",
    )
    add = parser.add_argument
    add("evaluations", metavar="DIR", nargs="+", help="folders with scores.json, as DIR or NAME=DIR")
    add("--baseline", metavar="NAME", help="compare each of the others with this one; the default is every pair")
    add("--size", metavar="POINTS", type=float, help="the difference, in points of 100, to name the needed "
        "questions and repeats for; the default is the one found")  # fmt: skip
    add("--json", metavar="FILE", type=Path, help="write the numbers there, too")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.evaluation import comparison, scores_file

    if args.size is not None and not 0 < args.size <= 100:
        raise UserError(f"must be above 0 and at most 100 points, found {args.size}", field="--size")
    named = names(args.evaluations)
    if len(named) < 2:
        raise UserError("two or more evaluations are needed", field="DIR", remedy="bvpo compare A/eval B/eval")
    if args.baseline is not None and args.baseline not in named:
        raise UserError(f"{args.baseline!r} is none of {', '.join(named)}", field="--baseline")
    if args.json is not None and args.json.name == SCORES:
        raise UserError("an evaluation is named so, and would be lost", file=str(args.json), field="--json")
    evaluations = [(name, scores_file.read(path)) for name, path in named.items()]
    for line in comparison.remarks(evaluations):
        print(f"note: {line}")
    found = comparison.compare(evaluations, args.baseline, None if args.size is None else args.size / 100)
    if not found:
        raise UserError(
            "the evaluations have no dataset and mode with common questions",
            remedy="evaluate with the same --suite and --modes",
        )
    for one in found:
        print(one.sentence())
    if args.json:
        _write(args.json, found)
    return 0


def names(given: list[str]) -> dict[str, Path]:
    """Name → folder. A folder without a name gets as much of the end of its path as tells it from the others.

    Raises:
        UserError: two evaluations are the same, or have the same name.
    """
    pairs = [_split(text) for text in given]
    resolved: dict[Path, str] = {}
    for text, (_, path) in zip(given, pairs, strict=True):
        if (twin := resolved.setdefault(path.resolve(), text)) is not text:
            raise UserError(f"{twin} and {text} are the same folder", field="DIR", remedy="give it once")
    pairs = [(name, path.parent if path.name == SCORES else path) for name, path in pairs]
    unnamed = [path for name, path in pairs if name is None]
    out: dict[str, Path] = {}
    for name, path in pairs:
        name = name if name is not None else _short(path, unnamed)
        if name in out:
            raise UserError(f"two evaluations are named {name!r}", field="DIR", remedy="give NAME=DIR")
        out[name] = path
    return out


def _split(text: str) -> tuple[str | None, Path]:
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        return None, Path(text)
    if not name or not path:
        raise UserError(f"expected NAME=DIR, found {text!r}", field="DIR")
    return name, Path(path)


def _short(path: Path, others: list[Path]) -> str:
    parts = path.resolve().parts
    tails = [other.resolve().parts for other in others if other.resolve() != path.resolve()]
    # From the first part that the others do not share, without what they all end in (RUN/eval).
    common = 0
    while (
        tails
        and all(len(t) > common + 1 and t[-1 - common] == parts[-1 - common] for t in tails)
        and common < len(parts) - 1
    ):
        common += 1
    end = len(parts) - common
    for start in range(end - 1, 0, -1):
        tail = parts[start:end]
        if not any(t[len(t) - common - len(tail) : len(t) - common] == tail for t in tails):
            return "/".join(tail)
    return str(path)


def _write(path: Path, found: list[Any]) -> None:
    rows = [
        {
            "a": one.a,
            "b": one.b,
            "dataset": one.title,
            "mode": one.mode,
            **one.found._asdict(),
            "corrected": one.corrected,
            "better": one.verdict or None,
            "sentence": one.sentence(),
        }
        for one in found
    ]
    try:
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", file=str(path), field="--json") from None
