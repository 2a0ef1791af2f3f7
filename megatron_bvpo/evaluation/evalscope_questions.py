"""evalscope's questions, prompts and scorers, without its way of asking. The one file that imports evalscope.

A benchmark is asked in two steps. Its questions become prompts of the sampling client, which knows how thinking is
switched off and forgets nothing. The answers then go through evalscope's own inference and scoring, with a model
(`ModelAPI`) that says what was sampled. Benchmarks that talk in several turns, use tools or show images do not fit.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation.suites import Dataset, Unavailable
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.judging.judge_items import Item, Streaming, without_judge
from megatron_bvpo.sampling.samples import Judgement, Prompt

MODEL = "bvpo_samples"


class JudgeModel(NamedTuple):
    """The model that judges where evalscope asks for one.

    Attributes:
        address: its server, with `/v1`.
        model: its name there.
        key: the server's key; None: none is asked for.
        concurrency: answers that are judged at once.
    """

    address: str
    model: str
    key: str | None = None
    concurrency: int = 16


class Benchmark:
    """One of evalscope's benchmarks, loaded.

    Args:
        dataset: which.
        judge: for benchmarks that are judged; None: rules alone.
        scratch: a folder that evalscope may write to.

    Attributes:
        title: its name for people.
        metric: what its scores are.
        judge: the judge model, if its scorer is one.
        book: its questions as prompts.
        left_out: questions with images.

    Raises:
        Unavailable: it is unknown, its data cannot be loaded, or it needs a judge that was not given.
    """

    def __init__(self, dataset: Dataset, judge: JudgeModel | None, scratch: Path) -> None:
        get_benchmark, config = _evalscope()
        task: dict[str, Any] = {
            "model": MODEL,
            "eval_type": "mock_llm",  # nothing is asked by evalscope
            "datasets": [dataset.evalscope],
            "dataset_args": {dataset.evalscope: _settings(dataset)},
            "work_dir": str(scratch),
            "judge": {"strategy": "rule"},
        }
        if judge:
            model = {"model_id": judge.model, "api_url": judge.address, "api_key": judge.key or "EMPTY"}
            task["judge"] = {"strategy": "auto", "models": [model]}
        try:
            self._adapter = get_benchmark(dataset.evalscope, config(**task))
            self._adapter.validate_judge_strategy()
            with _own_cache(scratch / "datasets" / dataset.name) if dataset.path else nullcontext():
                subsets = self._adapter.load_dataset()
        except Exception as error:  # whatever evalscope, a hub or a reader of files raises
            raise Unavailable(_told(error, dataset, judge)) from error
        self.judge, self._scratch = judge if self._adapter.use_llm_judge else None, scratch
        self.title = self._adapter.pretty_name or dataset.name
        self.metric = next(iter(self._adapter.metric_list), "score")  # a name, or {name: arguments}
        if isinstance(self.metric, dict):
            self.metric = next(iter(self.metric))
        self.version = getattr(self._adapter.benchmark_meta, "evaluation_version", None)
        self.book, self.left_out = PromptBook(), 0
        self._questions: dict[str, Any] = {}
        for subset in subsets.values():
            for question in subset:
                if dataset.limit is None or len(self.book) < dataset.limit:
                    self._add(dataset, question)
        if not self.book:
            raise Unavailable(f"it has no questions of text ({self.left_out} with images)")

    def _add(self, dataset: Dataset, question: Any) -> None:
        if any(not isinstance(m.content, str) and any(c.type != "text" for c in m.content) for m in question.input):
            self.left_out += 1
            return
        messages = [{"role": message.role, "content": message.text} for message in question.input]
        name = hashlib.sha256(json.dumps([messages, question.target], ensure_ascii=False).encode()).hexdigest()[:16]
        again = 1
        while (prompt_id := name if again == 1 else f"{name}-{again}") in self._questions:
            again += 1
        self._questions[prompt_id] = question
        answer = question.target if isinstance(question.target, str) else json.dumps(question.target)
        self.book.add(Prompt(prompt_id, messages, answer, f"{dataset.name}:{len(self.book) + 1}", {}))

    def score(self, item: Item) -> Judgement:
        """What evalscope's scorer says of one answer: its main score, and the answer that it read."""
        from evalscope.api.model import GenerateConfig, Model

        try:
            question = self._questions[item.key.prompt_id].model_copy(deep=True)
            state = self._adapter.run_inference(
                Model(_recorded(item.text), GenerateConfig()), question, str(self._scratch)
            )
            score = self._adapter.calculate_metrics(state).score
        except Exception as error:  # a scorer's fault is told of the answer, and spoils no other
            return Judgement(*item.key, error=f"{type(error).__name__}: {_line(error)}")
        if not score.status.is_usable or score.main_value is None:
            why = score.explanation or json.dumps(score.metadata, default=str, ensure_ascii=False)
            return Judgement(*item.key, error=f"no score: {_line(why)}")
        parsed = (score.extracted_prediction or "").strip() or None
        return Judgement(*item.key, score=float(score.main_value), parsed=parsed)


class EvalscopeJudge(Streaming):
    """A benchmark's scorer as one of our judges.

    Args:
        benchmark: loaded.
    """

    name = "evalscope"
    needs_answers = False

    def __init__(self, benchmark: Benchmark) -> None:
        from evalscope.version import __version__

        self._benchmark = benchmark
        judge = benchmark.judge
        self.settings = {
            "kind": "evalscope",
            "evalscope": __version__,
            "benchmark": benchmark.version,
            "judge": judge.model if judge else None,
        }

    def stream(self, items: Iterable[Item]) -> Iterator[Judgement]:
        judge = self._benchmark.judge
        if judge is None:
            yield from map(self._one, items)
            return
        with ThreadPoolExecutor(judge.concurrency) as pool:
            yield from pool.map(self._one, items)

    def _one(self, item: Item) -> Judgement:
        return without_judge(item) or self._benchmark.score(item)


def _settings(dataset: Dataset) -> dict[str, Any]:
    return {**dataset.settings, **({"local_path": str(dataset.path)} if dataset.path else {})}


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """datasets finds a local copy in its cache by its folder's name: an older or another one of that name would be read
    in its place."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def _evalscope():
    try:
        # Python's own warnings and evalscope's remarks on each data set are not for users of this command.
        logging.getLogger("evalscope").setLevel(logging.ERROR)
        from evalscope.api.registry import get_benchmark
        from evalscope.config import TaskConfig
    except ImportError as error:
        raise UserError(
            f"evalscope is not there: {error}",
            field="--suite",
            remedy="pip install 'megatron-bvpo[eval]', or give a suite of local files",
        ) from None
    for name in ("evalscope", "math_verify", "httpx", "httpx2"):  # a line for each request of a judge
        logging.getLogger(name).setLevel(logging.ERROR)
    return get_benchmark, TaskConfig


def _recorded(text: str):
    """A model of evalscope's that says `text` to whatever it is asked."""
    from evalscope.api.model import ModelAPI, ModelOutput

    class Recorded(ModelAPI):
        def generate(self, input, tools, tool_choice, config):
            return ModelOutput.from_content(self.model_name, text)

    return Recorded(MODEL)


def _told(error: Exception, dataset: Dataset, judge: JudgeModel | None) -> str:
    line = _line(error)
    if judge is None and "judge" in line:
        return f"it is judged by a model: give --judge_server ({line})"
    if dataset.path:
        return f"cannot be loaded from {dataset.path} ({type(error).__name__}: {line})"
    return f"cannot be loaded ({type(error).__name__}: {line}); --data {dataset.name}=PATH gives a local copy"


def _line(text: Any) -> str:
    lines = str(text).strip().splitlines()
    return lines[0][:300] if lines else ""
