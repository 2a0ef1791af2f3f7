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

`job` and `run` are paths from the working folder, or from that of the rounds file.
`slurm: {nodes: 4, gpus_per_node: 8}` in sample, train or evaluate submits that stage; at the top it holds what all
submissions share. docs/loop.md has the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.adapter_folders import max_rank
from megatron_bvpo.launching.flag_names import unknown_keys
from megatron_bvpo.launching.rivals import settle
from megatron_bvpo.sampling.asking import sample_command
from megatron_bvpo.sampling.asking.job_file import PROMPTS
from megatron_bvpo.sampling.asking.request_options import extra_body
from megatron_bvpo.sampling.judging import judge_command
from megatron_bvpo.sampling.judging.judges import judge_name
from megatron_bvpo.sampling.pairing import pairs_command
from megatron_bvpo.sampling.pairing.pair_mixing import read_heldout
from megatron_bvpo.workflow.checked_sections import CheckedReader
from megatron_bvpo.workflow.sections import Place
from megatron_bvpo.workflow.yaml_lines import key_lines

START, LAST = "start", "last"
ROUND = "{round}"
KEYS = ("rounds", "model", "reference", "out", "slurm", "sample", "judge", "pairs", "train", "export", "evaluate")
# What a round decides by itself.
OF_SAMPLING = ("out", "server", "model", "api_key_file", "batch", "retry_failed")
OF_PAIRS = ("out", "overwrite", "heldout_out", "report", "judge", "mix")
OF_TRAINING = (
    "model", "dataset", "val_dataset", "output_dir", "adapters", "ref_adapters", "ref_model", "mcore_adapter",
    "mcore_model", "mcore_ref_adapter", "mcore_ref_model", "no_save_optim", "finetune", "bvpo_ref_cache",
)  # fmt: skip


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
        paths: (key, path) of what else must be there at the start.
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
    paths: tuple[tuple[str, str], ...] = ()

    def prompts(self, number: int) -> list[str]:
        """Files of a round."""
        return [name.replace(ROUND, str(number)) for name in _several(self.sample.settings[PROMPTS])]


def read_rounds(file: str, out: str | None = None) -> Rounds:
    """A rounds file.

    Args:
        out: --out, which wins over the file's.

    Raises:
        UserError: what is missing or wrong, with its line.
    """
    return _Reader(file).read(out)


def require_files(rounds: Rounds) -> None:
    """Raise UserError where the model's folder, a round's prompts, or another file is not on this machine."""
    lines = key_lines(rounds.file)

    def fail(key: str, message: str, remedy: str):
        raise UserError(message, file=rounds.file, line=lines.get(key), field=key, remedy=remedy)

    if not Path(rounds.model).is_dir():
        remedy = "name the folder where it lies: engines, tokenizer and exports read it"
        fail("model", f"there is no folder {rounds.model}", remedy)
    for number in range(1, rounds.rounds + 1):
        for name in rounds.prompts(number):
            if not Path(name).exists():
                fail("sample.prompts", f"there is no {name}, for round {number}", "check the path")
    for key, path in rounds.paths:
        if not Path(path).exists():
            fail(key, f"there is no {path}", "check the path")


def _several(value: Any) -> list:
    """What is one or a list of them."""
    return value if isinstance(value, list) else [value]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null: a section takes a file's key away so."""
    return {key: value for key, value in values.items() if value is not None}


class _Reader(CheckedReader):
    """Reads one file; what is wrong is raised with the file's name and the key's line."""

    what, example = "rounds", "configs/rounds_235b.yaml"

    def read(self, out: str | None) -> Rounds:
        self.require_known(KEYS)
        sample, train = self.sampling(), self.training()
        judge = self.judging(sample)
        merge, number = self.merging(), self.whole_number("rounds", self.needed("rounds"))
        pairs, heldout = self.pairing(sample, number)
        rank = int(str(train.settings.get("lora_rank", 8)))
        try:
            rank = rank if merge else max_rank(rank)
        except UserError as error:
            self.fail("train.lora_rank", error.message, "add `export: {merge: true}`")
        return Rounds(
            file=self.file,
            out=Path(os.path.abspath(self.out_folder(out, Path("rounds", Path(self.file).stem)))),
            rounds=number,
            model=self.text("model"),
            reference=self.choice("reference", (START, LAST)),
            sample=sample,
            judge=judge,
            judge_name=self.judge_name(),
            pairs=pairs,
            heldout=heldout,
            train=train,
            lora_rank=rank,
            merge=merge,
            evaluate=self.evaluation(sample),
            paths=tuple(self.paths(sample)),
        )

    def paths(self, sample: Asking) -> Iterator[tuple[str, str]]:
        """(key, path) of a model's folders and files that flags name."""
        if sample.settings.get("tokenizer"):
            yield "sample.tokenizer", str(sample.settings["tokenizer"])
        flags = (("judge", "rubric"), ("judge", "tokenizer"), ("pairs", "exclude"), ("evaluate", "tokenizer"))
        for section, flag in flags:
            for path in _several(self.section(section).get(flag) or []):
                yield f"{section}.{flag}", str(path)

    # ---- sections

    def sampling(self) -> Asking:
        section = self.section("sample", needed=True)
        values, engine = self.job_file("sample", section)
        place = self.place("sample", section)
        self.size("sample", place, 1)
        engine = self.engine_of("sample", {**engine, **self.engine("sample", section)})
        values = {key: value for key, value in values.items() if key not in OF_SAMPLING}
        flags = _given({**values, **section})
        for key in (PROMPTS, "max_tokens"):
            if flags.get(key) is None:
                self.fail("sample", f"has no {key}", f"add `{key}: …` below sample, or to its job's file")
        prompts = _several(flags[PROMPTS])
        if not prompts or not all(isinstance(name, str) and name for name in prompts):
            self.fail("sample.prompts", f"is {flags[PROMPTS]!r}; expected files", "write prompts-{round}.jsonl")
        given = "sample x --out x --model x --server http://x".split()
        _, args = self.options("sample", sample_command.add_command, given, OF_SAMPLING, {
            key: value for key, value in flags.items() if key != PROMPTS
        })  # fmt: skip
        with self.flags_told("sample"):
            sample_command.check_options(args)
            extra_body(args.extra_body)
        if args.judge:
            self.check_judge("sample", args.judge, args.judge_name, args, "judge_", here=place.slurm is None)
        return Asking(flags, engine, place)

    def judging(self, sample: Asking) -> tuple[str, ...] | None:
        section = self.section("judge")
        if not section:
            if not sample.settings.get("judge"):
                self.fail("judge", "is missing, and sample judges nothing", "add `judge: {with: math}`")
            return None
        if "with" not in section:
            self.fail("judge", "has no `with`", "add `with: math` below it; docs/judges.md has the judges")
        words, args = self.options("judge", judge_command.add_command, ["judge", "x"], ("again",), section)
        self.check_judge("judge", args.spec, args.name, args)
        return tuple(words)

    def judge_name(self) -> str | None:
        """Where `judge` names one; sample's own judge may lie beside it."""
        section = self.section("judge")
        return str(section.get("name") or judge_name(str(section["with"]))) if section else None

    def pairing(self, sample: Asking, rounds: int) -> tuple[tuple[str, ...], bool]:
        """Flags of bvpo pairs, and whether prompts are held out."""
        section = self.section("pairs")
        words, args = self.options("pairs", pairs_command.add_command, ["pairs", "x", "--out", "x"], OF_PAIRS, section)
        with self.flags_told("pairs"):
            pairs_command.check_options(args)
        again = any(ROUND not in name for name in _several(sample.settings[PROMPTS]))
        if rounds > 1 and again and isinstance(args.heldout and read_heldout(args.heldout), int):
            message = f"is {args.heldout} of the prompts that have a pair, which each round may be others, and all "
            message += "rounds have the same prompts: what one holds out another would train on"
            remedy = "give a share, such as 0.02, or files of each round, with {round} in `prompts`"
            self.fail("pairs.heldout", message, remedy)
        return tuple(words), bool(args.heldout)

    def training(self) -> Training:
        section = self.section("train", needed=True)
        place = self.place("train", section)
        ranks = self.whole_number("train.ranks", section.pop("ranks", 1))
        run, base = self.run_file(section)
        for key in section:
            if key in OF_TRAINING:
                self.fail(f"train.{key}", "is given by the rounds", "leave it out")
        if unknown := unknown_keys(section):
            key, _, rest = unknown[0].partition(": ")
            self.fail(f"train.{key}", rest)
        with self.told("train"):
            dropped, _ = settle(base, {**section, "dataset": "x", "val_dataset": "x"}, run)
        kept = {key: value for key, value in base.items() if key not in {*dropped, *OF_TRAINING}}
        settings = _given({**kept, **section})
        if str(settings.get("tuner_type", "full")) != "lora":
            self.fail("train", f"{run} is no LoRA run, and a round goes on from an adapter", "add tuner_type: lora")
        if str(settings.get("bvpo_new_layers_only")).lower() == "true":
            told = f"{run} trains whole layers beside its adapter, and a round goes on from an adapter alone"
            self.fail("train", told, "leave bvpo_new_layers_only out")
        self.check_run(settings, self.size("train", place, ranks), run, "train")
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
        self.size("evaluate", place, 1)
        engine = self.engine_of("evaluate", {**sample.engine, **self.engine("evaluate", section)})
        self.check_evaluation(section)
        return Asking(section, engine, place)

    # ---- values

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        found = self.values.get(key) or known[0]
        if found not in known:
            self.fail(key, f"is {found!r}; expected {' or '.join(known)}")
        return found
