"""Sections of rounds and sweeps whose values are looked at before anything starts, as their commands will do."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation import eval_command, suites
from megatron_bvpo.launching.run_file import read_keys
from megatron_bvpo.sampling.asking.job_file import read_job
from megatron_bvpo.sampling.asking.request_options import extra_body
from megatron_bvpo.sampling.judging.judge_command import OPTIONS
from megatron_bvpo.sampling.judging.judge_items import JudgeOptions
from megatron_bvpo.sampling.judging.judges import check_name, check_spec, is_function, is_importable
from megatron_bvpo.workflow.command_flags import parsed
from megatron_bvpo.workflow.sections import Place, SectionReader
from megatron_bvpo.workflow.submission_size import submission_size
from megatron_bvpo.workflow.training_values import check_rows, check_training
from megatron_bvpo.workflow.yaml_lines import key_lines

OF_EVALUATION = ("out", "server", "model", "api_key_file", "retry_failed")
# Of vllm serve.
ENGINE_COUNTS = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs"}


class CheckedReader(SectionReader):
    """Reads one file. Every method raises UserError with the file's name and the line of the key."""

    # ---- values

    def text(self, key: str) -> str:
        found = self.needed(key)
        if not isinstance(found, str) or not found.strip():
            self.fail(key, f"is {found!r}; expected a name or a folder")
        return found

    def out_folder(self, given: str | None, usual: Path) -> Path:
        """--out, else the file's `out`; not within another chain's folder, whose runs it would lie among."""
        out = Path(given or (usual if self.values.get("out") is None else self.text("out")))
        whole = Path(os.path.realpath(out))

        def fail(message: str, remedy: str):
            if given is None and "out" in self.values:
                self.fail("out", f"{out} {message}", remedy)
            raise UserError(message, file=str(whole), field="--out", remedy=remedy)

        there = next(folder for folder in (whole, *whole.parents) if folder.exists())
        if not there.is_dir():
            fail("is no folder" if there == whole else f"lies in {there}, which is no folder", "name another one")
        for above in whole.parents:
            if (above / "chain.json").is_file():
                message = f"lies in {above}, which is another sweep's or rounds' folder"
                fail(message, "give a folder of its own")
        return out

    def file_of(self, key: str, name: Any, read: Callable[[str], Any]) -> tuple[str, Any]:
        """A file that a key names, and what `read` makes of it."""
        if not isinstance(name, str):
            self.fail(key, f"is {name!r}; expected a file")
        file = self.beside(name)
        try:
            return file, read(file)
        except UserError as error:
            if error.line is None and not Path(file).is_file():
                self.fail(key, f"{name}: {error.message}", error.remedy)
            raise

    # ---- the training

    def run_file(self, section: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Takes `run` out of `train`: the file and its keys."""
        if (name := section.pop("run", None)) is None:
            self.fail("train", "has no `run`", "add `run: configs/FILE.yaml`, a file of swift rlhf")
        file, keys = self.file_of("train.run", name, read_keys)
        return file, {str(key).replace("-", "_"): value for key, value in keys.items()}

    def size(self, name: str, place: Place, here: int) -> int | None:
        """Ranks of a stage; None: nobody can say."""
        if place.slurm is None:
            return here
        try:
            nodes, gpus = submission_size(place.slurm)
        except UserError as error:
            own = f"{name}.slurm.{error.field}"
            self.fail(own if own in self.lines else f"slurm.{error.field}", error.message, error.remedy)
        return None if gpus is None else nodes * gpus

    def check_run(self, settings: Mapping[str, Any], ranks: int | None, run: str, *places: str) -> None:
        """Looks at a training's keys.

        Args:
            settings: those of the file `run`, and of this file's `places` over it, the first of them over all.
        """
        try:
            check_training(settings, ranks)
            check_rows(settings)
        except UserError as error:
            key = error.field
            place = next((place for place in places if f"{place}.{key}" in self.lines), None)
            line = key_lines(run).get(str(key)) if place is None else None
            if line is not None:
                raise UserError(error.message, file=run, line=line, field=key, remedy=error.remedy) from None
            self.fail(f"{place or places[0]}.{key}", error.message, error.remedy)

    # ---- commands

    def options(
        self, name: str, add_command: Callable, command: list[str], own, section: Mapping[str, Any]
    ) -> tuple[list[str], argparse.Namespace]:
        """A section's flags as words, and as the command reads them."""
        words = self.flags(name, add_command, command, own, section)
        return words, parsed(add_command, [*command, *words])

    def job_file(self, key: str, section: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes `job` out of a section: what that file has for the command, and for the engine."""
        if (name := section.pop("job", None)) is None:
            return {}, {}
        return self.file_of(f"{key}.job", name, read_job)[1]

    def engine_of(self, section: str, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Flags of vllm serve without those that are null; a null takes a file's key away. Of the numbers, those are
        looked at that every version reads as such."""
        found = {key: value for key, value in flags.items() if value is not None}
        for key in ENGINE_COUNTS & found.keys():
            if not re.fullmatch(r"0*[1-9]\d*", str(found[key])):
                self.fail(f"{section}.engine.{key}", f"is {found[key]!r}; expected a whole number of 1 or more")
        return found

    def check_evaluation(self, section: Mapping[str, Any]) -> None:
        """Flags of bvpo eval: as it looks at them itself, and whether the suite is known and its files are there."""
        given = "eval --server http://x --model x --out x".split()
        _, args = self.options("evaluate", eval_command.add_command, given, OF_EVALUATION, section)
        with self.flags_told("evaluate"):
            eval_command.check_options(args)
            extra_body(args.extra_body)
            found = suites.suite(args.suite, suites.copies(args.data), args.limit)
        for dataset in found:
            if dataset.path and not dataset.path.exists():
                self.fail("evaluate.suite", f"{dataset.name}: there is no {dataset.path}", "check the path")

    def check_judge(
        self, section: str, spec: str, name: str | None, args: argparse.Namespace, prefix: str = "", here: bool = True
    ) -> None:
        """Looks at a judge and its options, and asks no server.

        Args:
            prefix: of its options' names.
            here: it judges where this runs, so that what it imports must be there.
        """
        with self.flags_told(section, prefix):
            check_spec(spec)
            JudgeOptions(**{option: getattr(args, prefix + option) for option in OPTIONS})
            if name is not None:
                check_name(name)
            module = "math_verify" if spec == "math" else spec.partition(":")[0] if is_function(spec) else None
            if here and module and not is_importable(module):
                raise UserError(f"{spec}: there is no module {module}", field="--with", remedy="install it here")

    @contextmanager
    def flags_told(self, section: str, prefix: str = "") -> Iterator[None]:
        """A command's own words about its flags, as this file's; of a file, in the message."""
        try:
            yield
        except UserError as error:
            key = (error.field or "").removeprefix("--")
            if not key:
                raise
            key = "judge" if prefix and key == "with" else prefix + key
            what = f"{error.file}: {error.message}" if error.file else error.message
            remedy = error.remedy and re.sub(r"--(?=\w)", "", error.remedy)
            self.fail(f"{section}.{key}", what, remedy)
