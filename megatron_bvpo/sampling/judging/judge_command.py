"""`bvpo judge`: what a judge says of the samples of a folder, as Parquet beside them."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling import samples as folder_of
from megatron_bvpo.sampling.judging.judge_items import Item, Judge, item
from megatron_bvpo.sampling.judging.judge_summary import Summary
from megatron_bvpo.sampling.judging.judgement_folder import JudgementFolder
from megatron_bvpo.sampling.judging.judges import judge_name, make_judge
from megatron_bvpo.sampling.samples import Prompt, SampleKey

INTERRUPTED = 130
PROGRESS_S = (0.2, 30.0)  # between two lines of progress: on a terminal, in a log


def add_command(commands) -> None:
    """Register `judge` with the subparsers of `bvpo`."""
    parser = commands.add_parser(
        "judge",
        help="judge the samples of a folder",
        description="Judges what the judge has not judged yet, and goes on where it was stopped. Several judges stand "
        "side by side, each in judgements/NAME. docs/judges.md tells what each of them takes.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder that bvpo sample filled")
    parser.add_argument(
        "--with",
        dest="spec",
        metavar="SPEC",
        required=True,
        help="math, exact, choice, reward:URL, llm:URL, package.module:function",
    )
    parser.add_argument("--name", help="its name (default: the kind, or the function's name)")
    parser.add_argument("--text", choices=("final", "whole"), default="final", help="what is judged (default: final)")
    parser.add_argument(
        "--again", choices=("failed", "all"), help="judge those without a verdict once more, or drop all and begin anew"
    )
    add_options(parser)
    parser.set_defaults(run=run_command)


def add_options(parser, prefix: str = "--") -> None:
    """The options of `JudgeOptions` (`OPTIONS`), with names of their own where a command has others of these names."""
    add = parser.add_argument
    add(f"{prefix}workers", type=int, default=0, help="processes of math and of functions (default: cores)")
    add(f"{prefix}time_limit", type=float, default=0.0, metavar="S", help="for one answer (default: 10, 120, 600)")
    add(f"{prefix}model", default="", help="name of the served judge (default: the server's first)")
    add(f"{prefix}rubric", type=Path, metavar="FILE", help="llm: the rubric")
    add(f"{prefix}threshold", type=float, help="a score from here on is right")
    add(f"{prefix}concurrency", type=int, default=64, help="requests in flight (default: 64)")
    add(f"{prefix}label", type=int, help="reward: which of a classifier's numbers is the score, counted from 0")
    add(
        f"{prefix}tokenizer", type=Path, metavar="DIR", help="reward: the model's tokenizer, for servers that want text"
    )
    add(f"{prefix}max_tokens", type=int, default=4096, help="llm: of the judge's reply (default: 4096)")
    add(f"{prefix}ignore_case", action="store_true", help="exact: compare without case")


OPTIONS = (
    "workers",
    "time_limit",
    "model",
    "rubric",
    "threshold",
    "concurrency",
    "label",
    "tokenizer",
    "max_tokens",
    "ignore_case",
)


def run_command(args: argparse.Namespace) -> int:
    prompts = {prompt.prompt_id: prompt for prompt in folder_of.read_prompts(args.folder)}
    judge = make_judge(args.spec, **{name: getattr(args, name) for name in OPTIONS})
    try:
        _check_answers(judge, prompts, args.folder)
        name = args.name or judge_name(args.spec)
        settings = {**judge.settings, "text": args.text}
        with JudgementFolder(args.folder, name, settings, replace=args.again == "all") as folder:
            _judge(judge, prompts, folder, args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        judge.close()
    summary = Summary(folder_of.read_judgements(args.folder, name)) if folder.judged() else Summary()
    print(f"judge {name} ({args.spec}), text: {args.text}")
    print("\n".join(summary.lines()))
    return 0


def _check_answers(judge: Judge, prompts: dict[str, Prompt], folder: Path) -> None:
    without = sum(prompt.answer is None for prompt in prompts.values())
    if judge.needs_answers and without == len(prompts):
        raise UserError(
            "no prompt has an answer to compare with",
            file=str(folder / folder_of.PROMPTS),
            field="--with",
            remedy="sample rows with an `answer`, or take a judge that needs none (reward, a rubric without {answer})",
        )
    if judge.needs_answers and without:
        print(f"{without} of {len(prompts)} prompts have no answer; their samples get no verdict", file=sys.stderr)


def _judge(judge: Judge, prompts: dict[str, Prompt], folder: JudgementFolder, args: argparse.Namespace) -> None:
    known = folder.judged(but_failed=args.again == "failed")
    with _progress(args.folder, len(known)) as bar:
        right = seen = 0
        for said in judge.stream(_items(args.folder, prompts, known, args.text == "whole")):
            folder.add([said])
            right, seen = right + (said.right is True), seen + (said.right is not None)
            bar.update()
            if seen:
                bar.set_postfix_str(f"right {right / seen:.3f}", refresh=False)


def _items(folder: Path, prompts: dict[str, Prompt], known: set[SampleKey], whole: bool) -> Iterator[Item]:
    for sample in folder_of.read_samples(folder):
        if sample.key in known:
            continue
        if sample.prompt_id not in prompts:
            raise UserError(
                f"a sample of prompt {sample.prompt_id!r}, which is not among the prompts",
                file=str(folder / folder_of.PROMPTS),
                remedy="prompts and samples are of different runs; sample anew",
            )
        yield item(prompts[sample.prompt_id], sample, whole)


def _progress(folder: Path, known: int):
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        desc="judged",
        total=max(0, count_samples(folder) - known),
        unit=" answers",
        mininterval=PROGRESS_S[0] if terminal else PROGRESS_S[1],
        maxinterval=PROGRESS_S[0] if terminal else PROGRESS_S[1],
        delay=0 if terminal else PROGRESS_S[1],
    )


def count_samples(folder: Path) -> int:
    """About how many samples there are: those in a journal and a shard count twice, or, while that changes, not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    for path in (*(folder / folder_of.JOURNAL).glob("*.jsonl"), *(folder / folder_of.SAMPLES).glob("*.parquet")):
        try:
            count += path.read_bytes().count(b"\n") if path.suffix == ".jsonl" else pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException):
            pass  # gone by now; or damaged, which who reads it says
    return count
