"""`bvpo sample`: answers of a served model in each mode, into a folder that `bvpo judge` and `bvpo pairs` read."""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking import job_file
from megatron_bvpo.sampling.asking.request_options import (
    api_key,
    check_addresses,
    check_requests,
    extra_body,
    make_asking,
    raise_file_limit,
)
from megatron_bvpo.sampling.judging import judge_command

_MODES = ("thinking", "empty", "short")
_BUDGETS = ("uniform", "balanced", "gvm", "pairs")


def add_command(commands) -> None:
    """Register `sample` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "sample",
        help="sample answers of a served model, with and without thinking",
        description="Asks one or more OpenAI-compatible servers (vLLM, SGLang, swift deploy) for several answers to "
        "each prompt in each mode. Stopped at any moment and given again, the same command goes on where it was.",
    )
    _add_what(parser)
    _add_how(parser)
    parser.set_defaults(run=run_command)


def with_job_file(argv: list[str]) -> list[str]:
    """`sample FILE.yaml …` as `sample PROMPTS --flags …` (job_file.py); anything else comes back as it is."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_what(parser)
    _add_how(parser)
    known = [word.lstrip("-") for action in parser._actions for word in action.option_strings]
    return argv[:1] + job_file.unroll(argv[1:], known)


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", nargs="+", help="files of rows with `messages` or `prompt`, and `answer`")
    add("--out", metavar="DIR", required=True, type=Path, help="the folder of samples")
    add("--server", metavar="URL", nargs="+", default=[], help="base addresses, such as http://node1:8000")
    add("--model", metavar="NAME", required=True, help="the model's name at the servers")
    add("--samples", metavar="N", type=int, default=8, help="answers a prompt and mode (8)")
    add("--modes", nargs="+", choices=_MODES, default=["thinking", "empty"], help="modes (thinking empty)")
    add("--temperature", type=float, default=0.8, help="(0.8)")
    add("--top_p", type=float, default=0.95, help="(0.95)")
    add("--max_tokens", metavar="N", type=int, required=True, help="tokens that one answer may have")
    add("--seed", type=int, default=0, help="all requests' seeds come from it (0)")
    add("--limit", metavar="N", type=int, help="take the first N prompts")
    add("--tokenizer", metavar="PATH", help="the model's folder with chat template and tokenizer.json, by default "
        "--model where that is a folder; needed for short, and for empty without --thinking_switch")  # fmt: skip
    add("--thinking_switch", metavar="NAME", help="variable of the chat template that switches thinking, such as "
        "enable_thinking; the default is what the tokenizer's template has")  # fmt: skip
    add("--empty_block", metavar="TEXT", help="text of an empty trace; the default is the template's switch, or "
        r"$'<think>\n\n</think>\n\n'. The same as the training's --bvpo_empty_block")  # fmt: skip
    add("--short_budget", metavar="TOKENS", type=int, help="tokens that a short trace keeps")
    add("--extra_body", metavar="JSON", help="more fields for each request, such as '{\"top_k\": 20}'")


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--concurrency", metavar="N", type=int, default=256, help="requests in flight, over all servers (256)")
    add("--timeout", metavar="SECONDS", type=float, default=3600, help="that one answer may take (3600)")
    add("--tries", metavar="N", type=int, default=8, help="how often a request may fail (8)")
    add("--patience", metavar="SECONDS", type=float, default=600, help="to wait when no server answers (600)")
    add("--retry_failed", action="store_true", help="ask again for what is recorded as failed")
    add("--api_key_file", metavar="FILE", help="file with the servers' key; the default is OPENAI_API_KEY")
    add("--judge", metavar="SPEC", help="judge while sampling, as bvpo judge --with SPEC does")
    add("--judge_name", metavar="NAME", help="as bvpo judge's --name")
    add("--judge_text", choices=("final", "whole"), default="final", help="as bvpo judge's --text (final)")
    judge_command.add_options(parser, "--judge_")
    add("--budget", choices=_BUDGETS, default="uniform", help="who gets how many of --samples times prompts (uniform)")
    add("--pilot", metavar="N", type=int, default=4, help="samples that a budget looks at first (4)")
    add("--max_samples", metavar="N", type=int, default=64, help="samples that a budget may give one prompt (64)")
    add("--batch", choices=("write", "read"), help="write the requests as files in OpenAI's batch format, for "
        "vllm run-batch, or read its results; no server is asked")  # fmt: skip


def run_command(args: argparse.Namespace) -> int:
    check_options(args)
    extra = extra_body(args.extra_body)
    asking = make_asking(args, extra)
    from megatron_bvpo.sampling.asking.journal import FolderLock, drop_failed
    from megatron_bvpo.sampling.asking.prompts import read_prompt_files
    from megatron_bvpo.sampling.asking.run_settings import prepare

    if not args.batch:  # told before minutes are spent on reading
        key = api_key(args.api_key_file)
        check_addresses(args.server)
        raise_file_limit(args.concurrency)
    book, bad = read_prompt_files(args.prompts, args.limit)
    for line in bad.lines():
        print(line, file=sys.stderr)
    for line in prepare(args.out, settings_of(args, asking, book, extra), book):
        print(line, file=sys.stderr)
    lock = FolderLock(args.out)
    try:
        if args.retry_failed and (dropped := drop_failed(args.out)):
            print(f"{dropped} failed requests are asked again", file=sys.stderr)
        if args.batch:
            from megatron_bvpo.sampling.asking.batch_files import batch_command

            return batch_command(args, asking, book, _batch_rounds(args, book))
        return _sample(args, asking, book, key)
    except KeyboardInterrupt:  # while it reads or writes; while it asks, a signal ends it in order
        return 130
    finally:
        lock.release()


def _sample(args: argparse.Namespace, asking, book, key: str | None) -> int:
    import asyncio
    from contextlib import ExitStack

    from megatron_bvpo.sampling.asking.progress import Progress
    from megatron_bvpo.sampling.asking.sampling_run import SamplingRun
    from megatron_bvpo.sampling.asking.servers import ServerPool

    progress = Progress(len(book) * args.samples * len(args.modes))

    async def go(stack: ExitStack):
        judging, rounds = _judging(args, book, progress, stack)
        run = SamplingRun(
            args.out,
            book,
            asking,
            modes=args.modes,
            samples=args.samples,
            progress=progress,
            judging=judging,
            rounds=rounds,
        )
        progress.say(
            f"{len(book):,} prompts, modes {', '.join(args.modes)}: {progress.total:,} samples, "
            f"{progress.done:,} are there; empty: {asking.empty_by}"
        )
        limits = {"timeout": args.timeout, "tries": args.tries, "patience": args.patience}
        pool = ServerPool(args.server, args.model, key=key, say=progress.say, **limits)
        return await run.run(pool, args.concurrency)

    try:
        with ExitStack() as stack:
            told = asyncio.run(go(stack))
    finally:
        progress.close()
    return _tell(args, told, progress)


def _tell(args: argparse.Namespace, told, progress) -> int:
    print(f"{progress.done:,} of {progress.total:,} samples in {args.out}: {progress.line()}", file=sys.stderr)
    for mark, count in sorted(told.marks.items()):
        print(f"  {mark}: {count:,}", file=sys.stderr)
    if failures := told.failures.lines():
        print(*(f"  {line}" for line in failures), sep="\n", file=sys.stderr)
        print("  --retry_failed asks for the failed ones again", file=sys.stderr)
    if told.left:
        print(f"  the budget left {told.left:,} samples unspent", file=sys.stderr)
    if told.stopped is None:
        return 0
    print(f"stopped by {told.stopped.name}; the same command goes on", file=sys.stderr)
    return 128 + told.stopped


# --- what was given ---


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that are out of range, and for options that do not go together."""
    check_requests(args, "samples", "prompt", ("pilot", "max_samples", "short_budget"))
    args.modes = [mode for mode in _MODES if mode in args.modes]
    if "short" in args.modes and "thinking" not in args.modes:
        raise UserError("short cuts the traces of thinking samples", field="--modes", remedy="add thinking")
    if ("short" in args.modes) != (args.short_budget is not None):
        what = "short needs a budget" if "short" in args.modes else "is for the mode short"
        raise UserError(what, field="--short_budget", remedy="give both or neither")
    if not args.batch and not args.server:
        raise UserError("missing", field="--server", remedy="give the servers' addresses, or --batch write")
    if args.budget != "uniform":
        _check_budget(args)


def _check_budget(args: argparse.Namespace) -> None:
    if args.judge is None:
        raise UserError(f"{args.budget} needs verdicts", field="--budget", remedy="give --judge")
    if args.pilot > args.samples:
        raise UserError(
            f"{args.pilot} is more than the {args.samples} samples a prompt", field="--pilot", remedy="lower it"
        )
    if args.max_samples < args.pilot:
        raise UserError(f"{args.max_samples} is less than --pilot {args.pilot}", field="--max_samples")


def settings_of(args: argparse.Namespace, asking, book, extra: dict[str, Any]) -> dict[str, Any]:
    """What the samples depend on, for settings.json."""
    from megatron_bvpo.sampling.asking.run_settings import VERSION

    budget = {"name": args.budget, "pilot": args.pilot, "max_samples": args.max_samples, "judge": args.judge}
    return {
        "version": VERSION,
        "model": args.model,
        "modes": args.modes,
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "empty": asking.empty_by if "empty" in args.modes else None,
        "short_budget": args.short_budget,
        "chat_template": asking.template.digest if asking.template else None,
        "extra_body": extra,
        "budget": budget if args.budget != "uniform" else None,
        "prompts": {"count": len(book), "digest": book.digest},
    }


def _judging(args: argparse.Namespace, book, progress, stack) -> tuple[Any, Any]:
    """The judge that works while sampling, and the rounds of a budget; None where not asked for."""
    from megatron_bvpo.sampling.asking.live_judging import LiveJudging
    from megatron_bvpo.sampling.judging.judgement_folder import JudgementFolder
    from megatron_bvpo.sampling.judging.judges import judge_name, make_judge

    if args.judge is None:
        return None, None
    try:
        judge = make_judge(args.judge, **{name: getattr(args, f"judge_{name}") for name in judge_command.OPTIONS})
    except UserError as error:
        # The same options have other names here.
        named = {"--with": "--judge"} | {f"--{name}": f"--judge_{name}" for name in judge_command.OPTIONS}
        raise UserError(
            error.message, file=error.file, field=named.get(error.field, error.field), remedy=error.remedy
        ) from None
    stack.callback(judge.close)
    if judge.needs_answers and not any(prompt.answer is not None for prompt in book):
        raise UserError("no prompt has an answer to compare with", field="--judge", remedy="give rows with `answer`")
    name = args.judge_name or judge_name(args.judge)
    folder = stack.enter_context(JudgementFolder(args.out, name, {**judge.settings, "text": args.judge_text}))
    rounds = make_rounds(args, book)
    verdict = {"verdict": rounds.judged} if rounds else {}
    return LiveJudging(judge, folder, book, progress, whole=args.judge_text == "whole", **verdict), rounds


def _batch_rounds(args: argparse.Namespace, book) -> Any:
    """The rounds of a budget with the verdicts that `bvpo judge` has given."""
    from megatron_bvpo.sampling.asking.journal import known_rows
    from megatron_bvpo.sampling.judging.judges import judge_name
    from megatron_bvpo.sampling.samples import JUDGEMENTS, SAMPLES, Judgement

    rounds = make_rounds(args, book)
    if rounds is None:
        return None
    folder = args.out / JUDGEMENTS / (args.judge_name or judge_name(args.judge))
    judged = set()
    for row in known_rows(folder, ["prompt_id", "mode", "number", "right"], later_first=True):
        said = Judgement(**row)
        if said.key not in judged:
            judged.add(said.key)
            rounds.judged(said)
    left = sum((r["prompt_id"], r["mode"], r["number"]) not in judged for r in known_rows(
        args.out / SAMPLES, ["prompt_id", "mode", "number"]))  # fmt: skip
    if left and args.batch == "write":
        raise UserError(
            f"{left:,} samples are not judged yet, and the next round depends on them",
            file=str(folder),
            remedy=f"bvpo judge {args.out} --with {args.judge}",
        )
    return rounds


def make_rounds(args: argparse.Namespace, book) -> Any:
    """The rounds of a budget; None for uniform."""
    if args.budget == "uniform":
        return None
    from functools import partial

    from megatron_bvpo.sampling.asking import budgets
    from megatron_bvpo.sampling.asking.rounds import Rounds

    limits = {"total": args.samples * len(book), "pilot": args.pilot, "max_samples": args.max_samples}
    plan = partial(budgets.plan, args.budget, **limits)
    describe = partial(budgets.describe, chosen=args.budget, **limits)
    modes = tuple(mode for mode in args.modes if mode != "short")
    return Rounds(args.out, book, modes, plan, budgets.Tally, describe)
