"""ROUNDS.yaml: what `bvpo rounds` is asked for, checked before anything starts.

    rounds: 2
    model: /models/…             # the start: what is sampled first, and what all adapters are trained on
    reference: start             # or last: the model that the round began with
    out: rounds/…                # or --out
    sample:                      # a sampling job: `job: FILE.yaml`, and over it flags of bvpo sample and `engine`
      prompts: prompts-{round}.jsonl
    judge: {with: math}          # flags of bvpo judge; not needed where sample judges
    pairs: {heldout: 0.02}       # flags of bvpo pairs
    train:                       # `run: FILE.yaml`, and over it flags of the training; `ranks` of this machine
      run: configs/….yaml
    export: {merge: false}       # an adapter for the engine, or a merged model
    evaluate: {suite: math}      # flags of bvpo eval, and `engine` over sample's; leave it out to evaluate nothing

`slurm: {nodes: 4, gpus_per_node: 8}` in sample, train or evaluate submits that stage; at the top it holds what all
submissions share. docs/loop.md has the rest.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation import eval_command
from megatron_bvpo.launching.adapter_folders import max_rank
from megatron_bvpo.launching.flag_names import unknown_keys
from megatron_bvpo.launching.rivals import settle
from megatron_bvpo.launching.run_file import read_keys
from megatron_bvpo.sampling.asking import sample_command
from megatron_bvpo.sampling.asking.job_file import ENGINE, OWN_OF_THE_JOB, PROMPTS, read_job
from megatron_bvpo.sampling.judging import judge_command
from megatron_bvpo.sampling.pairing import pairs_command
from megatron_bvpo.workflow.command_flags import check_flags
from megatron_bvpo.workflow.yaml_lines import key_lines

START, LAST = "start", "last"
ROUND = "{round}"
KEYS = ("rounds", "model", "reference", "out", "slurm", "sample", "judge", "pairs", "train", "export", "evaluate")
# What a round decides by itself.
OF_SAMPLING = ("out", "server", "model", "api_key_file", "batch", "retry_failed")
OF_PAIRS = ("out", "overwrite", "heldout_out", "report", "judge", "mix")
OF_EVALUATION = ("out", "server", "model", "api_key_file", "retry_failed")
OF_TRAINING = (
    "model", "dataset", "val_dataset", "output_dir", "adapters", "ref_adapters", "ref_model", "mcore_adapter",
    "mcore_model", "mcore_ref_adapter", "mcore_ref_model", "no_save_optim", "finetune", "bvpo_ref_cache",
)  # fmt: skip
# One served model, whose name and adapters a round decides.
OF_THE_ENGINE = (*OWN_OF_THE_JOB, "served_model_name", "lora_modules", "enable_lora")


@dataclass(frozen=True)
class Place:
    """Where a stage runs: submitted with these flags of sbatch, or here (None)."""

    slurm: Mapping[str, Any] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(
            word
            for key, value in (self.slurm or {}).items()
            for word in (f"--{key.replace('_', '-')}", *([] if value is True else [str(value)]))
        )


@dataclass(frozen=True)
class Asking:
    """A stage that asks an engine.

    Attributes:
        settings: flags of bvpo sample, prompts among them, or of bvpo eval, without those that a round gives.
        engine: flags of vllm serve.
    """

    settings: Mapping[str, Any]
    engine: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class Training:
    """Keys of the run's YAML file, and how many ranks it has on this machine."""

    settings: Mapping[str, Any]
    ranks: int
    place: Place


@dataclass(frozen=True)
class Rounds:
    """A checked file.

    Attributes:
        judge: words behind `bvpo judge DIR`; None where the samples are judged as they arrive.
        judge_name: whose words count, None where one judge alone can be there.
        pairs: words behind `bvpo pairs DIR --out FILE`.
        heldout: whether prompts are held out of training.
        lora_rank: as an engine is told it.
        merge: serve merged models instead of adapters.
    """

    file: str
    out: Path
    rounds: int
    model: str
    reference: str
    sample: Asking
    judge: tuple[str, ...] | None
    judge_name: str | None
    pairs: tuple[str, ...]
    heldout: bool
    train: Training
    lora_rank: int
    merge: bool
    evaluate: Asking | None

    def prompts(self, number: int) -> list[str]:
        """Files of a round."""
        given = self.sample.settings[PROMPTS]
        return [str(name).replace(ROUND, str(number)) for name in (given if isinstance(given, list) else [given])]


def read_rounds(file: str, out: str | None = None) -> Rounds:
    """A rounds file.

    Args:
        out: --out, which wins over the file's.

    Raises:
        UserError: what is missing or wrong, with its line.
    """
    return _Reader(file).read(out)


class _Reader:
    """Reads one file; what is wrong is raised with the file's name and the key's line."""

    def __init__(self, file: str):
        self.file = file
        self.values = {str(key).replace("-", "_"): value for key, value in read_keys(file).items()}
        self.lines = key_lines(file)

    def read(self, out: str | None) -> Rounds:
        for key in self.values:
            if key not in KEYS:
                close = difflib.get_close_matches(key, KEYS, 1)
                self.fail(key, "is no part of a rounds file", f"write {close[0]}" if close else f"of {', '.join(KEYS)}")
        sample, train = self.sampling(), self.training()
        judge = self.judging(sample)
        merge = self.merging()
        pairs = self.section("pairs")
        rank = self.whole_number("train.lora_rank", train.settings.get("lora_rank", 8))
        try:
            rank = rank if merge else max_rank(rank)
        except UserError as error:
            self.fail("train.lora_rank", error.message, "add `export: {merge: true}`")
        rounds = Rounds(
            file=self.file,
            out=self.folder(out),
            rounds=self.whole_number("rounds", self.needed("rounds")),
            model=self.text("model"),
            reference=self.choice("reference", (START, LAST)),
            sample=sample,
            judge=judge,
            judge_name=self.judge_name(),
            pairs=tuple(self.flags("pairs", pairs_command.add_command, ["pairs", "x", "--out", "x"], OF_PAIRS, pairs)),
            heldout=bool(pairs.get("heldout")),
            train=train,
            lora_rank=rank,
            merge=merge,
            evaluate=self.evaluation(sample),
        )
        self.check_prompts(rounds)
        return rounds

    # ---- sections

    def sampling(self) -> Asking:
        section = self.section("sample", needed=True)
        values, engine = self.job(section)
        place = self.place("sample", section)
        engine = {**engine, **self.engine("sample", section)}
        values = {key: value for key, value in values.items() if key not in OF_SAMPLING}
        flags = {**values, **section}
        for key in (PROMPTS, "max_tokens"):
            if flags.get(key) is None:
                self.fail("sample", f"has no {key}", f"add `{key}: …` below sample, or to its job's file")
        self.flags("sample", sample_command.add_command, ["sample", "x", "--out", "x", "--model", "x"], OF_SAMPLING, {
            key: value for key, value in flags.items() if key != PROMPTS
        })  # fmt: skip
        return Asking(flags, engine, place)

    def job(self, section: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if (file := section.pop("job", None)) is None:
            return {}, {}
        return read_job(str(file))

    def judging(self, sample: Asking) -> tuple[str, ...] | None:
        section = self.section("judge")
        if not section:
            if not sample.settings.get("judge"):
                self.fail("judge", "is missing, and sample judges nothing", "add `judge: {with: math}`")
            return None
        if "with" not in section:
            self.fail("judge", "has no `with`", "add `with: math` below it; docs/judges.md has the judges")
        return tuple(self.flags("judge", judge_command.add_command, ["judge", "x"], ("again",), section))

    def judge_name(self) -> str | None:
        """Where `judge` names one; sample's own judge may lie beside it."""
        from megatron_bvpo.sampling.judging.judges import judge_name

        section = self.section("judge")
        return (section.get("name") or judge_name(str(section["with"]))) if section else None

    def training(self) -> Training:
        section = self.section("train", needed=True)
        place = self.place("train", section)
        ranks = self.whole_number("train.ranks", section.pop("ranks", 1))
        run = section.pop("run", None)
        if run is None:
            self.fail("train", "has no `run`", "add `run: configs/FILE.yaml`, a file of swift rlhf")
        base = {str(key).replace("-", "_"): value for key, value in read_keys(str(run)).items()}
        for key in section:
            if key in OF_TRAINING:
                self.fail(f"train.{key}", "is given by the rounds", "leave it out")
        if unknown := unknown_keys(section):
            key, _, rest = unknown[0].partition(": ")
            self.fail(f"train.{key}", rest)
        dropped, _ = settle(base, {**section, "dataset": "x", "val_dataset": "x"}, str(run))
        settings = {key: value for key, value in base.items() if key not in {*dropped, *OF_TRAINING}} | section
        settings = {key: value for key, value in settings.items() if value is not None}  # null takes a key away
        if str(settings.get("tuner_type", "full")) != "lora":
            self.fail("train", f"{run} is no LoRA run, and a round goes on from an adapter", "add tuner_type: lora")
        return Training(settings, ranks, place)

    def merging(self) -> bool:
        section = self.section("export")
        merge = section.pop("merge", False)
        if section or not isinstance(merge, bool):
            self.fail("export", "knows `merge`, true or false, and nothing else")
        return merge

    def evaluation(self, sample: Asking) -> Asking | None:
        section = self.section("evaluate")
        if not section:
            return None
        place = self.place("evaluate", section)
        engine = {**sample.engine, **self.engine("evaluate", section)}
        given = "eval --server http://x --model x --out x".split()
        self.flags("evaluate", eval_command.add_command, given, OF_EVALUATION, section)
        return Asking(section, engine, place)

    # ---- parts of sections

    def section(self, name: str, needed: bool = False) -> dict[str, Any]:
        found = self.values.get(name)
        if found is None and needed:
            self.fail(name, "is missing", f"add `{name}:` with its flags below it; configs/rounds_235b.yaml has one")
        if not isinstance(found or {}, dict):
            self.fail(name, "is no mapping", "write `flag: value` a line, indented")
        return {str(key).replace("-", "_"): value for key, value in (found or {}).items()}

    def place(self, name: str, section: dict[str, Any]) -> Place:
        """Takes `slurm` out of a section."""
        own, common = section.pop("slurm", None), self.values.get("slurm") or {}
        for key, found in ((f"{name}.slurm", own), ("slurm", common)):
            if found is not None and not isinstance(found, dict):
                self.fail(key, "is no mapping", "write flags of sbatch: {nodes: 4, gpus_per_node: 8}")
        return Place(None if own is None else {**common, **own})

    def engine(self, name: str, section: dict[str, Any]) -> dict[str, Any]:
        """Takes `engine` out of a section."""
        found = section.pop(ENGINE, None) or {}
        if not isinstance(found, dict):
            self.fail(f"{name}.{ENGINE}", "is no mapping", "write flags of vllm serve, indented")
        found = {str(key).replace("-", "_"): value for key, value in found.items()}
        for key in found.keys() & set(OF_THE_ENGINE):
            self.fail(f"{name}.{ENGINE}.{key}", "is given by the rounds", "leave it out")
        return found

    def flags(self, name: str, add_command: Callable, command: list[str], own, section: Mapping[str, Any]) -> list[str]:
        with self.told(name):
            return check_flags(add_command, command, own, section)

    def check_prompts(self, rounds: Rounds) -> None:
        for number in range(1, rounds.rounds + 1):
            for name in rounds.prompts(number):
                if not Path(name).exists():
                    self.fail("sample.prompts", f"there is no {name}, for round {number}", "check the path")

    # ---- values

    def folder(self, given: str | None) -> Path:
        return Path(os.path.abspath(given or self.values.get("out") or Path("rounds", Path(self.file).stem)))

    def needed(self, key: str) -> Any:
        if self.values.get(key) is None:
            self.fail(key, "is missing", f"add `{key}: …`")
        return self.values[key]

    def text(self, key: str) -> str:
        found = self.needed(key)
        if not isinstance(found, str):
            self.fail(key, f"is {found!r}; expected a name or a folder")
        return found

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        found = self.values.get(key) or known[0]
        if found not in known:
            self.fail(key, f"is {found!r}; expected {' or '.join(known)}")
        return found

    def whole_number(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, f"is {value!r}; expected a whole number of 1 or more")
        return value

    # ---- mistakes

    def fail(self, key: str, message: str, remedy: str | None = None):
        line = self.lines.get(key) or self.lines.get(key.rpartition(".")[0])
        raise UserError(message, file=self.file, line=line, field=key, remedy=remedy)

    @contextmanager
    def told(self, name: str) -> Iterator[None]:
        """Mistakes without a file are this file's section's."""
        try:
            yield
        except UserError as error:
            if error.file:
                raise
            key = f"{name}.{error.field}" if error.field else name
            self.fail(key, error.message, error.remedy)
