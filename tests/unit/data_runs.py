"""A run's data stage without a model: ms-swift's own loading, with our judging, measuring and encoding."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from contextlib import contextmanager

import swift.megatron.pipelines.train.rlhf  # noqa: F401  before the other modules of swift.megatron
from swift.arguments import BaseArguments
from swift.arguments.base_args.data_args import DataArguments
from swift.model import get_processor
from swift.template import get_template

from megatron_bvpo.data.batches import LAYOUT_KEY, TemplateSettings, make_bvpo_template
from megatron_bvpo.training import pipeline
from megatron_bvpo.training.row_counts import RowCounts


@dataclasses.dataclass
class Bvpo:
    """What the data stage asks of BvpoConfig."""

    empty: str = "strip"
    streams: tuple[str, ...] = ("trace", "empty")
    gate_threshold: float | None = None
    unpaired: bool = False


@dataclasses.dataclass
class DataOnly(DataArguments):
    """ms-swift's data arguments, and what else its data stage asks for."""

    bvpo: Bvpo = dataclasses.field(default_factory=Bvpo)
    lazy_tokenize: bool = False
    packing: bool = False
    packing_length: int | None = None
    packing_num_proc: int = 1
    packing_strategy: str = "binpack"
    truncation_strategy: str = "delete"
    max_length: int = 256
    rlhf_type: str = "bvpo"
    task_type: str = "causal_lm"
    output_dir: str = "."
    use_hf: bool = True
    hub_token: str | None = None

    load_dataset = BaseArguments.load_dataset


class DataStage(pipeline.BvpoPipeline):
    """The pipeline from its arguments to its datasets."""

    def __init__(self, args: DataOnly, template):
        self.args, self.template, self.train_msg = args, template, {}


def tiny_template(folder, max_length: int):
    """ms-swift's template over a tiny tokenizer of the model in `folder`, without the model."""
    template = get_template(
        get_processor(str(folder), model_type="qwen3_moe"),
        template_type="qwen3_thinking",
        loss_scale="last_round",
        max_length=max_length,
        truncation_strategy="raise",
    )
    template.set_mode("rlhf")
    return template


@dataclasses.dataclass
class Loaded:
    """What a data stage gave.

    Attributes:
        rows: the prompts of the training rows as they are trained, in order.
        pairs: pairs of each stream among them.
        log: the lines it said.
        counts: of rows encoded while training.
    """

    rows: list[str]
    pairs: dict[str, int]
    log: list[str]
    counts: RowCounts

    def numbers(self, pattern: str) -> list[tuple[int, ...]]:
        """The numbers in every line of the log that matches."""
        found = (re.search(pattern, line) for line in self.log)
        return [tuple(int(group) for group in match.groups()) for match in found if match]

    def lost(self, title: str) -> Counter[str]:
        """Reasons and counts under a title such as 'rows dropped:', over the whole log."""
        reasons: Counter[str] = Counter()
        inside = False
        for line in self.log:
            text = re.sub(r"^(training data: |[^ ]+: )", "", line)
            if match := re.match(r"  (\d+) × (.*)", text):
                if inside:
                    reasons[match[2]] += int(match[1])
            else:
                inside = bool(re.match(rf"\d+ rows? {title}", text))
        return reasons


def load(args: DataOnly, template, *, batch: int = 4) -> Loaded:
    """Runs the data stage and reads one epoch as the trainer does."""
    settings = TemplateSettings(
        pipeline.RowRules(args.bvpo.empty, args.bvpo.streams),
        "<think>\n\n</think>\n\n",
        count_unused=args.streaming or args.lazy_tokenize,
    )
    make_bvpo_template(template, settings)
    with recorded() as log:
        train, _ = DataStage(args, template)._prepare_dataset()
        rows, counts, pairs = [], RowCounts(args.bvpo.streams), Counter()
        items = iter(train) if args.streaming else (train[i] for i in range(len(train)))
        waiting: list = []
        for item in [*items, None]:
            if item is not None:
                waiting.append(item)
            if waiting and (item is None or len(waiting) == batch):
                layout = template.data_collator(waiting)[LAYOUT_KEY]
                counts.add([layout])
                flat = [row for entry in waiting for row in (entry if isinstance(entry, list) else [entry])]
                rows += [prompt_of(row, template) for row in flat]
                pairs.update({stream: layout.count(stream) for stream in ("trace", "empty")})
                waiting = []
    return Loaded(rows, dict(pairs), log, counts)


def prompt_of(row: dict, template) -> str:
    """The last user turn of an encoded row."""
    ids = row.get("chosen_input_ids", row.get("empty_chosen_input_ids"))
    return template.tokenizer.decode(ids).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]


@contextmanager
def recorded():
    """The lines that the pipeline logs in this block."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    keep, level = Keep(), pipeline.logger.level
    pipeline.logger.addHandler(keep)
    pipeline.logger.setLevel(logging.INFO)  # other tests want it quiet
    try:
        yield lines
    finally:
        pipeline.logger.removeHandler(keep)
        pipeline.logger.setLevel(level)
