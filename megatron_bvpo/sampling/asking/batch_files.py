"""The same requests as files in OpenAI's batch format, for `vllm run-batch` and wherever nothing may listen.

    DIR/batch/000001-chat.jsonl            requests that the model's chat template renders
    DIR/batch/000001-raw.jsonl             requests whose prompt is rendered here: empty without a switch, and short
    DIR/batch/raw.jinja                    the chat template for the raw ones: it writes its message as it is
    DIR/batch/000001-chat.results.jsonl    what the engine answers; `--batch read` takes all of these

`vllm run-batch` knows chat completions and no completions: so a rendered prompt goes through the chat route with a
template that adds nothing to it. A sample's name is its `custom_id`: prompt_id:mode:number.

Short samples need the traces of thinking ones, and budgets the verdicts of a round: write, run, read, and write again
for what comes next.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.account import Account, Work
from megatron_bvpo.sampling.asking.journal import known_rows, last_number
from megatron_bvpo.sampling.asking.modes import CHAT, COMPLETIONS, Asking, Request
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.asking.server_replies import choice_of, refusal_text
from megatron_bvpo.sampling.samples import SAMPLES, Sample, SampleKey, write_shard, writing

BATCH = "batch"
RAW_TEMPLATE = "{{ messages[0]['content'] }}"
_SHARD = 10_000


def write_batch(folder: Path, asking: Asking, book: PromptBook, works: Iterable[Work]) -> list[str]:
    """Writes the requests of `works`. Returns lines that say what to do next.

    Raises:
        UserError: the requests of before have no results yet.
    """
    batch = folder / BATCH
    batch.mkdir(exist_ok=True)
    for left in batch.glob(".*.jsonl"):
        left.unlink()
    if waiting := [path.name for path in _requests(batch) if not _results_of(path).exists()]:
        raise UserError(
            f"no results yet: {', '.join(waiting)}",
            file=str(batch),
            remedy="run them and give --batch read, or delete the files to write their requests anew",
        )
    number = 1 + max((int(path.name[:6]) for path in _requests(batch)), default=0)
    counts = {"chat": 0, "raw": 0}
    streams = {kind: open(batch / f".{number:06d}-{kind}.jsonl", "w", encoding="utf-8") for kind in counts}
    refused: Counter[str] = Counter()
    asking = replace(asking, as_text=True)
    try:
        for work in works:
            try:
                request = asking.request(book[work.index], work.mode, work.number, work.thinking)
            except UserError as error:
                refused[str(error)] += 1
                continue
            kind = "raw" if request.path == COMPLETIONS else "chat"
            streams[kind].write(json.dumps(_line(request), ensure_ascii=False) + "\n")
            counts[kind] += 1
    finally:
        for stream in streams.values():
            stream.close()
    lines = [f"{count} requests cannot be rendered: {why}" for why, count in refused.most_common(3)]
    return lines + _put(batch, number, counts, asking.model)


def _put(batch: Path, number: int, counts: dict[str, int], model: str) -> list[str]:
    """The files in place, and the commands that answer them."""
    lines = []
    for kind, count in counts.items():
        aside = batch / f".{number:06d}-{kind}.jsonl"
        if not count:
            aside.unlink()
            continue
        path = aside.rename(batch / f"{number:06d}-{kind}.jsonl")
        template = ""
        if kind == "raw":
            (batch / "raw.jinja").write_text(RAW_TEMPLATE, "utf-8")
            template = f" --chat-template {batch / 'raw.jinja'}"
        lines.append(f"{count:,} requests: vllm run-batch -i {path} -o {_results_of(path)} --model {model}{template}")
    return [*lines, "then: the same command with --batch read"] if lines else ["nothing is left to ask for"]


def _line(request: Request) -> dict[str, Any]:
    body = request.body
    if request.path == COMPLETIONS:
        kept = {key: value for key, value in body.items() if key not in ("prompt", "logprobs", "add_special_tokens")}
        body = {"messages": [{"role": "user", "content": body["prompt"]}], "logprobs": True, **kept}
    name = f"{request.prompt_id}:{request.mode}:{request.number}"
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def _requests(batch: Path) -> list[Path]:
    return sorted(path for path in batch.glob("[0-9]*.jsonl") if ".results" not in path.name)


def _results_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.results.jsonl")


# --- reading ---


def read_batch(folder: Path, asking: Asking, book: PromptBook, account: Account) -> list[str]:
    """Takes the results that are there as samples; those that were read before count once. Returns lines.

    A failed request counts where no file has an answer to it: later files have those that were asked again.

    Raises:
        UserError: there are no results, or all of them are errors.
    """
    files = sorted((folder / BATCH).glob("*.results*.jsonl"))
    if not files:
        raise UserError(
            "no results (*.results.jsonl)", file=str(folder / BATCH), remedy="run what --batch write has written"
        )
    told: Counter[str] = Counter()
    traces = _traces(folder, asking, book, account)
    waiting: list[Sample] = []
    failed: dict[SampleKey, Sample] = {}
    good = account.good
    for path in files:
        for sample in _samples(path, asking, book, account, traces, told):
            if sample.error is not None:
                failed[sample.key] = sample
                continue
            waiting.append(sample)
            account.add(*sample.key)
            good += 1
            if len(waiting) >= _SHARD:
                _write(folder, waiting)
    lost = [sample for sample in failed.values() if account.add(*sample.key)]
    if lost and not good:
        raise UserError(
            f"all {len(lost)} results are errors: {lost[0].error}",
            file=str(files[-1]),
            remedy="mend the settings or the engine; nothing was recorded",
        )
    told["samples are new"] += len(lost)
    told["requests failed"] += len(lost)
    _write(folder, waiting + lost)
    return [f"{count:,} {what}" for what, count in sorted((+told).items())]


def _write(folder: Path, samples: list[Sample]) -> None:
    if samples:
        write_shard(folder / SAMPLES / f"{last_number(folder) + 1:06d}.parquet", samples, Sample)
        samples.clear()


def _traces(folder: Path, asking: Asking, book: PromptBook, account: Account) -> dict[tuple[str, int], str]:
    """The cut traces of short samples that may have been asked for."""
    if asking.short_budget is None:
        return {}
    found = {}
    for row in known_rows(folder / SAMPLES, ["prompt_id", "mode", "number", "text"]):
        index = book.place.get(row["prompt_id"])
        if row["mode"] == "thinking" and row["text"] is not None and index is not None:
            if not account.has(index, "short", row["number"]):
                found[row["prompt_id"], row["number"]] = asking.short_trace(row["text"])
    return found


def _samples(path: Path, asking, book, account, traces, told: Counter[str]) -> Iterator[Sample]:
    with open(path, "rb") as stream:
        for line in stream:
            try:
                result = json.loads(line)
                prompt_id, mode, number = result["custom_id"].rsplit(":", 2)
                number, index = int(number), book.place[prompt_id]
            except (ValueError, TypeError, KeyError, AttributeError):
                told["lines are no results of these prompts"] += bool(line.strip())
                continue
            if account.has(index, mode, number):
                told["results were read before"] += 1
                continue
            if mode == "short" and (prompt_id, number) not in traces:
                told["short results whose thinking sample is not there"] += 1
                continue
            trace = traces.get((prompt_id, number), "") if mode == "short" else ""
            request = Request(prompt_id, mode, number, asking.seed_of(prompt_id, mode, number), CHAT, {}, trace)
            sample = _sample(asking, request, result)
            told["samples are new"] += sample.error is None
            yield sample


def _sample(asking: Asking, request: Request, result: dict[str, Any]) -> Sample:
    response = result.get("response") or {}
    body = response.get("body")
    status = response.get("status_code", 200)
    if status == 200 and body is not None:
        outcome = choice_of(json.dumps(body).encode(), CHAT)
        if outcome.kind == "good":
            return asking.sample(request, outcome.choice, outcome.usage)._replace(server="batch")
        why = outcome.why
    else:
        why = f"{status}: {refusal_text(json.dumps(body or result.get('error') or 'no reason given').encode())}"
    failed = Sample(request.prompt_id, request.mode, request.number, None, finish_reason="error", seed=request.seed)
    return failed._replace(error=why, server="batch")


# --- the command ---


def batch_command(args: argparse.Namespace, asking: Asking, book: PromptBook, rounds: Any) -> int:
    """`bvpo sample … --batch write|read`."""
    from megatron_bvpo.sampling.asking.progress import Progress
    from megatron_bvpo.sampling.asking.sampling_run import SamplingRun

    progress = Progress(len(book) * args.samples * len(args.modes))
    settings = {"modes": args.modes, "samples": args.samples, "progress": progress, "rounds": rounds}
    run = SamplingRun(args.out, book, asking, **settings)
    if args.batch == "read":
        lines = read_batch(args.out, asking, book, run.account)
        lines.append(f"{run.account.count:,} of {progress.total:,} samples in {args.out}; {_next(args)}")
    else:
        with writing(args.out / BATCH):
            lines = write_batch(args.out, asking, book, _works(run, rounds))
    for line in lines:
        print(line, file=sys.stderr)
    return 0


def _next(args: argparse.Namespace) -> str:
    if args.budget != "uniform":
        return f"next: bvpo judge {args.out} --with SPEC, then --batch write for the next round"
    judge = f"; bvpo judge {args.out} --with {args.judge} judges them" if args.judge else ""
    return f"--batch write writes what is missing: short samples, lost results{judge}"


def _works(run, rounds: Any) -> Iterator[Work]:
    yield from run.short_works()
    if rounds is None:
        yield from run.works()
        return
    left = list(rounds.unfinished(run.account))
    if not left and (plan := rounds.next_round()) is not None:
        print(plan.line, file=sys.stderr)
        left = list(rounds.unfinished(run.account))
    yield from left
