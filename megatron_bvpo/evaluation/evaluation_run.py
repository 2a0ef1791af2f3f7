"""One evaluation: each set of questions is asked in each mode, scored, and told.

    DIR/answers/NAME/       a folder of samples for each set (sampling/samples.py), judgements beside them
    DIR/scores.json         at the end

Whatever ends the run, the same command goes on: answers are journalled as they arrive, scores every half minute.
"""

import argparse
import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation.scores_file import Missing, Score
from megatron_bvpo.evaluation.suites import Dataset, Unavailable
from megatron_bvpo.sampling.asking.modes import Asking
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.judging.judge_items import Judge, item
from megatron_bvpo.sampling.judging.judgement_folder import JudgementFolder, failed
from megatron_bvpo.sampling.samples import SETTINGS, THINKS, TRUNCATED, Judgement, read_judgements, read_samples

ANSWERS = "answers"


@dataclass
class Questions:
    """A set of questions, ready to be asked.

    Attributes:
        name, title: of the set.
        book: its prompts.
        judge: scores the answers.
        metric: what a score is; another judge model makes it another.
        graded: the judge's numbers are the scores; else an answer is right or wrong, where the judge says so.
        best: the best of these numbers; scores are parts of it.
    """

    name: str
    title: str
    book: PromptBook
    judge: Judge
    metric: str
    graded: bool = False
    best: float = 1.0


class Stopped(Exception):
    """A signal ended the asking."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(name)
        self.number = number


class EvaluationRun:
    """Asks and scores.

    Args:
        args: of `bvpo eval`.
        asking: how answers are asked for.
        key: the servers' key.
        settings: of a set's folder, but for its prompts: book → settings.
        say: takes a line for the user.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        asking: Asking,
        key: str | None,
        settings: Callable[[PromptBook], dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self.args, self.asking, self.key, self.settings, self.say = args, asking, key, settings, say
        self.missing: list[Missing] = []

    def run(self, questions: Questions) -> list[Score]:
        """The scores of one set in each mode.

        Raises:
            UserError: its folder holds other answers, or no server answers.
            Stopped: by a signal.
        """
        from megatron_bvpo.sampling.asking.journal import FolderLock, drop_failed
        from megatron_bvpo.sampling.asking.run_settings import prepare

        folder = self.args.out / ANSWERS / questions.name
        for line in prepare(folder, self._settings(folder, questions.book), questions.book):
            self.say(f"{questions.name}: {line}")
        lock = FolderLock(folder)
        try:
            if self.args.retry_failed:
                drop_failed(folder)
            self._ask(folder, questions)
            self._judge(folder, questions)
        finally:
            questions.judge.close()
            lock.release()
        scores = [self._score(folder, questions, mode) for mode in self.args.modes]
        return [score for score in scores if score is not None]

    def _settings(self, folder: Path, book: PromptBook) -> dict[str, Any]:
        """Fewer repeats or modes than a folder has are a part of it, and no other settings."""
        from megatron_bvpo.sampling.asking.run_settings import read

        now = self.settings(book)
        if (folder / SETTINGS).is_file():
            before = read(folder)
            now["samples"] = max(now["samples"], before.get("samples") or 0)
            if set(now["modes"]) < set(before.get("modes") or ()):
                now |= {name: before.get(name) for name in ("modes", "empty")}
        return now

    def _ask(self, folder: Path, questions: Questions) -> None:
        from megatron_bvpo.sampling.asking.progress import Progress
        from megatron_bvpo.sampling.asking.sampling_run import SamplingRun
        from megatron_bvpo.sampling.asking.servers import ServerPool

        args = self.args
        progress = Progress(len(questions.book) * args.repeats * len(args.modes))

        async def go():
            run = SamplingRun(
                folder, questions.book, self.asking, modes=args.modes, samples=args.repeats, progress=progress
            )
            self.say(f"{questions.title}: {progress.total:,} answers, {progress.done:,} are there")
            limits = {"timeout": args.timeout, "tries": args.tries, "patience": args.patience}
            pool = ServerPool(args.server, args.model, key=self.key, say=progress.say, **limits)
            return await run.run(pool, args.concurrency)

        try:
            told = asyncio.run(go())
        finally:
            progress.close()
        if told.stopped is not None:
            raise Stopped(int(told.stopped), told.stopped.name)

    def _judge(self, folder: Path, questions: Questions) -> None:
        settings = {**questions.judge.settings, "text": "final"}
        other = {"replace_other": self.args.judge_again, "remedy": "give another --out, or --judge_again"}
        with JudgementFolder(folder, questions.judge.name, settings, **other) as judgements:
            known = judgements.judged(but_failed=True)
            book = questions.book
            items = (
                item(book[book.place[sample.prompt_id]], sample)
                for sample in read_samples(folder)
                if sample.key not in known and sample.text is not None
            )
            for said in questions.judge.stream(items):
                judgements.add([said])

    def _score(self, folder: Path, questions: Questions, mode: str) -> Score | None:
        """The score of one mode, from what the folder holds."""
        name, repeats = questions.name, self.args.repeats
        samples = [s for s in read_samples(folder) if s.mode == mode and s.number < repeats]
        judge = questions.judge.name
        said = {j.key: j for j in read_judgements(folder, judge)} if any(s.text is not None for s in samples) else {}
        by_question: dict[str, list[float]] = {prompt_id: [] for prompt_id in questions.book.ids}
        good, reasons = [], []
        for sample in samples:
            judgement = said.get(sample.key)
            if judgement is None or failed(judgement):
                reasons.append(sample.error or (judgement.error if judgement else None) or "no verdict")
                continue
            by_question[sample.prompt_id].append(_counts(judgement, questions))
            good.append((sample, judgement))
        lost = len(questions.book) * repeats - len(good)
        if lost:
            why = max(set(reasons), key=reasons.count) if reasons else "not asked"
            self.missing.append(Missing(name, mode, f"{lost:,} of {lost + len(good):,} answers have no score: {why}"))
        if not good:
            return None
        tokens = [sample.tokens for sample, _ in good if sample.tokens is not None]

        def share(count: int) -> float:
            return count / len(good)

        return Score.of(
            by_question,
            dataset=name,
            title=questions.title,
            mode=mode,
            metric=questions.metric,
            repeats=repeats,
            tokens=sum(tokens) / len(tokens) if tokens else None,
            cut_off=share(sum(TRUNCATED in sample.marks for sample, _ in good)),
            unparsed=share(sum(judgement.parsed is None for _, judgement in good)),
            thinks=share(sum(THINKS in sample.marks for sample, _ in good)) if mode == "empty" else None,
            failed=lost,
            judge=questions.judge.settings,
        )


def _counts(judgement: Judgement, questions: Questions) -> float:
    """What an answer counts: the judge's number or its verdict, and the other one where that is all it says."""
    score = None if judgement.score is None else judgement.score / questions.best
    first, second = (score, judgement.right) if questions.graded else (judgement.right, score)
    return float(second if first is None else first)


def questions_of(dataset: Dataset, args: argparse.Namespace, scratch: Path) -> Questions:
    """A set of questions and its judge.

    Raises:
        Unavailable: it cannot be had.
        UserError: evalscope is not installed.
    """
    if dataset.evalscope is None:
        return _file(dataset, args, scratch)
    from megatron_bvpo.evaluation.evalscope_questions import Benchmark, EvalscopeJudge, JudgeModel

    model = None
    if args.judge_server:
        address = args.judge_server.rstrip("/").removesuffix("/v1") + "/v1"
        model = JudgeModel(address, args.judge_model, args.judge_key, args.judge_concurrency)
    benchmark = Benchmark(dataset, model, scratch)
    metric = f"{benchmark.metric} by {benchmark.judge.model}" if benchmark.judge else benchmark.metric
    return Questions(dataset.name, benchmark.title, benchmark.book, EvalscopeJudge(benchmark), metric)


def _file(dataset: Dataset, args: argparse.Namespace, scratch: Path) -> Questions:
    from megatron_bvpo.sampling.asking.prompts import read_prompt_files
    from megatron_bvpo.sampling.judging.judges import make_judge

    if dataset.path is None:
        raise Unavailable(f"it is a local file: give --data {dataset.name}=FILE")
    options: dict[str, Any] = {} if dataset.threshold is None else {"threshold": dataset.threshold}
    spec = dataset.judge
    if spec == "llm":
        if not args.judge_server:
            raise Unavailable("it is judged by a model: give --judge_server")
        spec = f"llm:{args.judge_server}"
        options |= {"model": args.judge_model or "", "concurrency": args.judge_concurrency}
        if dataset.rubric:
            options["rubric"] = scratch / f"{dataset.name}.rubric.txt"
            options["rubric"].write_text(dataset.rubric, "utf-8")
    try:
        book, bad = read_prompt_files([str(dataset.path)], dataset.limit)
    except UserError as error:  # whose field is an option of `bvpo sample`
        where = error.file or str(dataset.path)
        raise Unavailable(str(UserError(error.message, file=where, line=error.line, remedy=error.remedy))) from None
    try:
        judge = make_judge(spec, **options)
    except UserError as error:
        raise Unavailable(f"its judge {spec}: {error.message}") from None
    if judge.needs_answers and not any(prompt.answer is not None for prompt in book):
        raise Unavailable(f"no row of {dataset.path} has an `answer` to compare with")
    rubric = getattr(judge, "rubric", None)
    gives_numbers = rubric.scores if rubric else ":" in spec
    graded = gives_numbers and dataset.threshold is None
    metric = "score" if graded else "accuracy"
    if rubric:
        metric += f" by {judge.settings['model']}"
    for line in bad.lines():
        print(line)
    best = 10.0 if rubric and rubric.scores else 1.0
    return Questions(dataset.name, dataset.name, book, judge, metric, graded, best)
