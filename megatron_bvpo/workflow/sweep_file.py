"""SWEEP.yaml: what `bvpo sweep` is asked for, checked before anything starts.

    out: sweeps/…                # or --out
    train:                       # what all runs share: `run: FILE.yaml`, and over it flags of the training
      run: configs/….yaml
      ranks: 8                   # of this machine
    rows:                        # mixes of data files, by name
      DS1: [ds1.jsonl]
      DS2: [ds1.jsonl#2000, ds2.jsonl]
    grid:                        # a run for each combination
      rows: [DS1, DS2]
      lr: [1.0e-5, 2.0e-5]
    runs:                        # and these; a run without a name is named after its flags
      - {name: "70", rows: DS2, lr: 2.0e-5, beta: 0.075}
    reference_cache: FOLDER      # of all runs (default: OUT/references); false: none
    evaluate: {suite: math}      # flags of bvpo eval, `engine`, `merge`, `base`; leave it out to evaluate nothing

`slurm: {nodes: 4, gpus_per_node: 8}` in train or evaluate submits those stages; at the top it holds what all
submissions share. docs/sweep.md has the rest.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.evaluation import eval_command
from megatron_bvpo.launching.flag_names import unknown_keys
from megatron_bvpo.launching.rivals import settle
from megatron_bvpo.launching.run_file import read_keys
from megatron_bvpo.sampling.asking.job_file import read_job
from megatron_bvpo.workflow.data_files import data_file
from megatron_bvpo.workflow.sections import Place, SectionReader

KEYS = ("out", "train", "rows", "grid", "runs", "reference_cache", "evaluate", "slurm")
ROWS, NAME, BASE = "rows", "name", "base"
# What a sweep decides by itself, and what a run that must go on after a kill cannot have.
OF_A_RUN = ("output_dir", "add_version", "bvpo_ref_cache", "bvpo_refs_only", "no_save_optim", "ENV")
OF_EVALUATION = ("out", "server", "model", "api_key_file", "retry_failed")
NAMED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
LONGEST_NAME = 100


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: unique.
        rows: the mix's name, or None where the run file names its data.
        settings: all keys of its YAML file but those that a sweep gives.
    """

    name: str
    rows: str | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """How each run's model is asked.

    Attributes:
        flags: of bvpo eval, but those that a sweep gives.
        engine: flags of vllm serve.
        merge: serve merged models instead of adapters.
        base: ask the base model, too.
    """

    flags: Mapping[str, Any]
    engine: Mapping[str, Any]
    merge: bool
    base: bool
    place: Place


@dataclass(frozen=True)
class Sweep:
    """A checked file.

    Attributes:
        ranks: of a run on this machine.
        references: the folder of the shared reference cache, or None.
        common: the settings that all runs share.
    """

    file: str
    out: Path
    runs: tuple[Run, ...]
    ranks: int
    place: Place
    references: Path | None
    evaluation: Evaluation | None
    common: Mapping[str, Any]


def read_sweep(file: str, out: str | None = None) -> Sweep:
    """A sweep file.

    Args:
        out: --out, which wins over the file's.

    Raises:
        UserError: what is missing or wrong, with its line.
    """
    return _Reader(file).read(out)


class _Reader(SectionReader):
    """Reads one file; what is wrong is raised with the file's name and the key's line."""

    what, example = "sweep", "configs/sweep_003.yaml"

    def read(self, out: str | None) -> Sweep:
        self.require_known(KEYS)
        train = self.section("train", needed=True)
        place, ranks = self.place("train", train), self.whole_number("train.ranks", train.pop("ranks", 1))
        common = self.common(train)
        mixes = self.mixes()
        folder = self.folder(out)
        cache = self.values.get("reference_cache", True)
        if cache not in (True, False, None) and not isinstance(cache, str):
            self.fail("reference_cache", f"is {cache!r}; expected a folder, or false")
        references = Path(os.path.realpath(cache)) if isinstance(cache, str) else folder / "references"
        return Sweep(
            file=self.file,
            out=folder,
            runs=tuple(self.all_runs(common, mixes)),
            ranks=ranks,
            place=place,
            references=None if cache in (False, None) else references,
            evaluation=self.evaluation(),
            common=common,
        )

    def folder(self, given: str | None) -> Path:
        """OUT; not within another chain's folder, whose runs it would lie among."""
        out = Path(os.path.realpath(given or self.values.get("out") or Path("sweeps", Path(self.file).stem)))
        for above in out.parents:
            if (above / "chain.json").is_file():
                raise UserError(
                    f"lies in {above}, which is another sweep's or rounds' folder",
                    file=str(out),
                    field="--out",
                    remedy="give a folder of its own",
                )
        return out

    # ---- the runs

    def common(self, section: dict[str, Any]) -> dict[str, Any]:
        """The run file, with the section's flags over it."""
        run = section.pop("run", None)
        if run is None:
            self.fail("train", "has no `run`", "add `run: configs/FILE.yaml`, a file of swift rlhf")
        try:
            base = {str(key).replace("-", "_"): value for key, value in read_keys(self.beside(str(run))).items()}
        except UserError as error:
            if error.line is None and not Path(error.file).exists():
                self.fail("train.run", f"{run}: {error.message}", error.remedy)
            raise
        for key in OF_A_RUN:
            if key != "ENV":
                base.pop(key, None)
        return self.over(base, section, "train")

    def over(self, base: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`flags` over `base`; null takes a key away."""
        for key in flags:
            if key in OF_A_RUN:
                self.fail(f"{where}.{key}", "is given by the sweep", "leave it out")
        if unknown := unknown_keys(flags):
            key, _, rest = unknown[0].partition(": ")
            self.fail(f"{where}.{key}", rest, "name a flag of swift rlhf, or `rows`")
        with self.told(where):
            dropped, _ = settle(base, {key: value for key, value in flags.items() if value is not None})
        settings = {key: value for key, value in base.items() if key not in dropped} | dict(flags)
        return {key: value for key, value in settings.items() if value is not None}

    def mixes(self) -> dict[str, list[str]]:
        """Name → entries of --dataset, whose files are there."""
        found = {}
        for name, given in (self.values.get(ROWS) or {}).items() if self.is_mapping(ROWS) else []:
            key, entries = f"{ROWS}.{name}", given if isinstance(given, list) else [given]
            if not NAMED.fullmatch(str(name)):
                self.fail(key, "is no name of letters, digits and ._=+-")
            for entry in entries:
                if not isinstance(entry, str):
                    self.fail(key, f"has {entry!r}; expected files", "write [a.jsonl, b.jsonl#2000]")
                try:
                    data_file(entry)
                except UserError as error:
                    self.fail(key, f"{error.file or entry}: {error.message}", error.remedy)
            found[str(name)] = entries
        return found

    def all_runs(self, common: dict[str, Any], mixes: dict[str, list[str]]) -> list[Run]:
        asked = [("grid", cell, name) for cell, name in self.cells()]
        for i, given in enumerate(self.listed()):
            given = {str(key).replace("-", "_"): value for key, value in given.items()}
            name = given.pop(NAME, None)
            asked.append((f"runs.{i}", given, _name(given) if name is None else str(name)))
        if not asked:
            self.fail("runs", "is missing, and so is grid", "add `grid: {lr: [1.0e-5, 2.0e-5]}`, or a list of runs")
        found: dict[str, Run] = {}
        for where, flags, name in asked:
            if not NAMED.fullmatch(name) or len(name) > LONGEST_NAME:
                self.fail(where, f"{name!r} is no name of letters, digits and ._=+-", "give the run a `name`")
            if name in found or name == BASE:
                why = "is the base model's name" if name == BASE else "is the name of two runs"
                self.fail(where, f"{name!r} {why}", "give the run another `name`")
            found[name] = self.run(where, name, flags, common, mixes)
        return list(found.values())

    def run(self, where: str, name: str, flags: dict[str, Any], common: dict[str, Any], mixes) -> Run:
        flags, rows = dict(flags), flags.get(ROWS)
        flags.pop(ROWS, None)
        if rows is not None:
            if "dataset" in flags:
                self.fail(where, "has rows and dataset", "leave one out")
            if str(rows) not in mixes:
                known = ", ".join(mixes) or "none"
                self.fail(f"{where}.{ROWS}", f"there is no mix {rows!r}, of {known}", "add it below `rows:`")
            flags["dataset"] = mixes[str(rows)]
        settings = self.over(common, flags, where)
        if not settings.get("dataset") and not settings.get("cached_dataset"):
            self.fail(where, "has no rows, and the run file names no dataset", "add `rows: NAME`")
        return Run(name, None if rows is None else str(rows), settings)

    def cells(self) -> list[tuple[dict[str, Any], str]]:
        """Each combination of the grid, and its name: what differs in it."""
        if not self.is_mapping("grid"):
            return []
        grid = {str(key).replace("-", "_"): value for key, value in self.values["grid"].items()}
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                self.fail(f"grid.{key}", f"is {values!r}; expected a list of values", f"write {key}: [{values}]")
        several = [key for key, values in grid.items() if len(values) > 1]
        combinations = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())]
        return [(cell, _name({key: cell[key] for key in several} or cell)) for cell in combinations]

    def listed(self) -> list[dict[str, Any]]:
        found = self.values.get("runs") or []
        if not isinstance(found, list):
            self.fail("runs", "is no list", "write `- {name: a, lr: 1.0e-5}` a line")
        for i, run in enumerate(found):
            if not isinstance(run, dict):
                self.fail(f"runs.{i}", f"is {run!r}; expected flags", "write `- {name: a, lr: 1.0e-5}`")
        return found

    def beside(self, name: str) -> str:
        """A file as it is named, or beside this one."""
        other = Path(self.file).parent / name
        return str(other) if not Path(name).exists() and other.exists() else name

    def is_mapping(self, key: str) -> bool:
        found = self.values.get(key)
        if found is not None and not isinstance(found, dict):
            self.fail(key, "is no mapping", "write `name: [values]` a line, indented")
        return bool(found)

    # ---- the evaluation

    def evaluation(self) -> Evaluation | None:
        section = self.section("evaluate")
        if not section:
            return None
        place, job = self.place("evaluate", section), section.pop("job", None)
        engine = {**(read_job(self.beside(str(job)))[1] if job else {}), **self.engine("evaluate", section)}
        if not engine:
            remedy = "add `engine:` with flags of vllm serve, or `job:` with a file of configs/sampling_*.yaml"
            self.fail("evaluate", "has no engine that would be asked", remedy)
        switches = {}
        for key, usual in (("merge", False), (BASE, True)):
            switches[key] = section.pop(key, usual)
            if not isinstance(switches[key], bool):
                self.fail(f"evaluate.{key}", f"is {switches[key]!r}; expected true or false")
        given = "eval --server http://x --model x --out x".split()
        self.flags("evaluate", eval_command.add_command, given, OF_EVALUATION, section)
        return Evaluation(section, engine, switches["merge"], switches[BASE], place)


def _name(flags: Mapping[str, Any]) -> str:
    """Of a run: its rows, and what else it is given."""
    words = [str(flags[ROWS])] if ROWS in flags else []
    for key, value in flags.items():
        if key != ROWS:
            text = "+".join(str(item) for item in value) if isinstance(value, list) else str(value)
            words.append(f"{key}-{text}")
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", "_".join(words))
