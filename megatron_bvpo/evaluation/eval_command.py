"""`bvpo eval`: scores of a served model, with and without thinking, with intervals."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.request_options import (
    api_key,
    check_addresses,
    check_requests,
    extra_body,
    make_asking,
    raise_file_limit,
)

# What cannot be had was named, and the rest is there.
INCOMPLETE = 4
_MODES = ("thinking", "empty")


def add_command(commands) -> None:
    """Register `eval` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "eval",
        help="score a served model on benchmarks, with and without thinking",
        description="Asks a served model the questions of a suite as bvpo sample does, scores as evalscope does, "
        "and writes scores.json. Stopped at any moment and given again, the same command goes on where it was. Exit "
        "code 4: something could not be had, and is named.",
    )
    add = parser.add_argument
    add("--server", metavar="URL", nargs="+", required=True, help="base addresses, such as http://node1:8000")
    add("--model", metavar="NAME", required=True, help="the model's name at the servers")
    add("--suite", metavar="SUITE", required=True, help="math, chat, hard, safety, or a YAML file")
    add("--out", metavar="DIR", required=True, type=Path, help="the folder of answers and scores.json")
    add("--modes", nargs="+", choices=_MODES, default=list(_MODES), help="(thinking empty)")
    add("--repeats", metavar="K", type=int, default=1, help="answers to each question in each mode (1)")
    add("--max_tokens", metavar="N", type=int, required=True, help="tokens that one answer may have")
    add("--temperature", type=float, default=0.6, help="(0.6)")
    add("--top_p", type=float, default=0.95, help="(0.95)")
    add("--seed", type=int, default=0, help="all requests' seeds come from it (0)")
    add("--limit", metavar="N", type=int, help="the first N questions of each set")
    add("--data", metavar="NAME=PATH", nargs="+", default=[], help="local copies of a suite's data, for sites without "
        "a hub")  # fmt: skip
    add("--judge_server", metavar="URL", help="server of the model that judges, where a suite is judged")
    add("--judge_model", metavar="NAME", help="its name there")
    add("--judge_concurrency", metavar="N", type=int, default=16, help="answers that it judges at once (16)")
    add("--judge_again", action="store_true", help="where answers were judged otherwise (another judge, rubric or "
        "version), judge them anew")  # fmt: skip
    _add_asking(add)
    parser.set_defaults(run=run_command)


def _add_asking(add) -> None:
    """Options that mean what they mean to `bvpo sample`."""
    add("--tokenizer", metavar="PATH", help="as in bvpo sample")
    add("--thinking_switch", metavar="NAME", help="as in bvpo sample")
    add("--empty_block", metavar="TEXT", help="as in bvpo sample")
    add("--extra_body", metavar="JSON", help="as in bvpo sample")
    add("--concurrency", metavar="N", type=int, default=256, help="requests in flight, over all servers (256)")
    add("--timeout", metavar="SECONDS", type=float, default=3600, help="that one answer may take (3600)")
    add("--tries", metavar="N", type=int, default=8, help="how often a request may fail (8)")
    add("--patience", metavar="SECONDS", type=float, default=600, help="to wait when no server answers (600)")
    add("--retry_failed", action="store_true", help="ask again for what is recorded as failed")
    add("--api_key_file", metavar="FILE", help="file with the servers' key; the default is OPENAI_API_KEY")


def run_command(args: argparse.Namespace) -> int:
    from megatron_bvpo.evaluation import suites

    check_options(args)
    datasets = suites.suite(args.suite, suites.copies(args.data), args.limit)
    extra = extra_body(args.extra_body)
    # What `bvpo sample` has beside these.
    args.short_budget = None
    asking = make_asking(args, extra)
    key = api_key(args.api_key_file)
    check_addresses(args.server)
    raise_file_limit(args.concurrency)
    if args.judge_server:
        check_addresses([args.judge_server])
    args.judge_key = os.environ.get("BVPO_JUDGE_API_KEY") or None
    _make(args.out)
    _require_own(args.out, args.suite)
    return _evaluate(args, datasets, asking, key, extra)


def _evaluate(args: argparse.Namespace, datasets: list, asking, key: str | None, extra: dict[str, Any]) -> int:
    import tempfile

    from megatron_bvpo.evaluation import evaluation_run as evaluation
    from megatron_bvpo.evaluation import scores_file
    from megatron_bvpo.evaluation.suites import Unavailable

    def settings(book) -> dict[str, Any]:
        return _settings(args, asking, extra) | {
            "modes": args.modes,
            "samples": args.repeats,
            "prompts": {"count": len(book), "digest": book.digest},
        }

    run = evaluation.EvaluationRun(args, asking, key, settings, _say)
    scores = []
    with tempfile.TemporaryDirectory() as scratch:
        for dataset in datasets:
            try:
                questions = evaluation.questions_of(dataset, args, Path(scratch))
                scores += run.run(questions)
            except Unavailable as why:
                run.missing.append(scores_file.Missing(dataset.name, None, str(why)))
                _say(f"{dataset.name}: {why}")
            except evaluation.Stopped as stopped:
                _say(f"stopped by {stopped}; the same command goes on")
                return 128 + stopped.number
    found = scores_file.Scores(args.model, args.suite, _settings(args, asking, extra), scores, run.missing)
    path = scores_file.write(args.out, found)
    if scores:
        print("\n".join(scores_file.table(scores)))
    for missing in run.missing:
        where = f"{missing.dataset} {missing.mode}" if missing.mode else missing.dataset
        print(f"missing: {where}: {missing.why}")
    print(path)
    return INCOMPLETE if run.missing else 0


def _settings(args: argparse.Namespace, asking, extra: dict[str, Any]) -> dict[str, Any]:
    """What the answers depend on."""
    return {
        "model": args.model,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "empty": asking.empty_by if "empty" in args.modes else None,
        "chat_template": asking.template.digest if asking.template else None,
        "extra_body": extra,
    }


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that are out of range, and for options that do not go together."""
    check_requests(args, "repeats", "question", ("judge_concurrency",))
    if args.judge_server and not args.judge_model:
        raise UserError("missing", field="--judge_model", remedy="name the model that judges")
    args.modes = [mode for mode in _MODES if mode in args.modes]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", file=str(folder), field="--out") from None


def _require_own(out: Path, suite: str) -> None:
    """The scores of another suite would be written over."""
    from megatron_bvpo.evaluation import scores_file

    try:
        before = scores_file.read(out).suite
    except UserError:
        return  # none, or damaged ones
    if Path(before).name != Path(suite).name:
        raise UserError(
            f"holds the scores of the suite {before}", file=str(out), field="--out", remedy="give each suite its own"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
