"""A chain is data: stages, each a command that can be given again, and what must have ended well before it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from megatron_bvpo.errors import UserError

# A name is a path below OUT/stages, a file's name in a graph, and a part of a Slurm job's name.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*(/[A-Za-z0-9_][A-Za-z0-9_.=+-]*)*")
# Files above this are told apart by size and time: a digest would read all rows at every start.
MOST_BYTES = 2**24
# The value of a variable such as MASTER_PORT, as runs that go side by side on a machine need one each.
FREE_PORT = "a free port"
CACHE, CACHE_BEFORE = "XDG_CACHE_HOME", "BVPO_XDG_CACHE_HOME"
# Variables of one run or stage: with them all would share a folder, or begin anew at each start.
OF_ONE = ("BVPO_RUN_DIR", "BVPO_STOP_FILE", "BVPO_ATTEMPT", "BVPO_RUN_TOKEN", "BVPO_RESUME", "BVPO_STAGE")


@dataclass(frozen=True)
class Slurm:
    """How a stage is submitted.

    Attributes:
        script: launch/slurm.sbatch or launch/sample.sbatch.
        flags: of sbatch, such as ("--nodes", "4", "--gpus-per-node", "8").
    """

    script: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One command of a chain. Given again after a kill it must go on where it was, or begin anew by itself.

    Attributes:
        name: unique, such as `train/lr-1e-5`; its records are in OUT/stages/<name>.
        command: its words; `bvpo` or `python` as the first is this environment's. A Slurm stage's: what
            follows the script.
        after: names of the stages that must have ended well.
        env: on top of the environment; FREE_PORT becomes a port that is free when the stage starts.
        files: path → text, written before the command starts, such as a run's YAML file.
        reads: files that are there before the chain starts and decide what the stage does.
        cores: ranks or processes that it uses here; nothing of a Slurm stage's counts.
        slurm: submit instead of running here.
        whole: a path that appears whole when the work is done: where it is there, and no older than what it is made
            from, the command need not run again.
        kept: a path that is there as soon as the work has left what a later start goes on from.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    cores: int = 1
    slurm: Slurm | None = None
    whole: str | None = None
    kept: str | None = None

    @property
    def words(self) -> list[str]:
        """The command as it is started."""
        first, *rest = self.command
        own = {"bvpo": [sys.executable, "-m", "megatron_bvpo"], "python": [sys.executable]}
        return [*own.get(first, [first]), *rest]

    def shown(self) -> str:
        """The command as a person would type it."""
        env = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        submit = ["sbatch", *self.slurm.flags, self.slurm.script] if self.slurm else []
        return " ".join([*env, shlex.join([*submit, *self.command])])

    def what(self, out: Path) -> list[str]:
        """What decides the stage's result, a line each; two starts that differ in it must not share a folder.

        The chain's own folder is written OUT, so that it may be moved.
        """
        lines = [f"command: {word}" for word in self.command]
        lines += [f"{name}={value}" for name, value in sorted(self.env.items())]
        if self.slurm:
            lines += [f"script: {Path(self.slurm.script).name}"]
        for path, text in self.files.items():
            lines += [f"{Path(path).name}: {line}" for line in text.splitlines()]
        lines += [f"{path}: {_fingerprint(path)}" for path in self.reads]
        return [line.replace(str(out), "OUT") for line in lines]


def environment_of_snakemake(out: Path) -> dict[str, str]:
    """Its cache is in the chain's folder, as an image may have no home; stages keep theirs."""
    return {**os.environ, CACHE: str(out / ".snakemake" / "cache"), CACHE_BEFORE: os.environ.get(CACHE, "")}


def environment() -> dict[str, str]:
    """What stages inherit."""
    env = {name: value for name, value in os.environ.items() if name not in OF_ONE}
    before = env.pop(CACHE_BEFORE, None)
    if before is not None:
        env[CACHE] = before
    return {name: value for name, value in env.items() if value or name != CACHE}


def to_json(stages: list[Stage]) -> list[dict]:
    return [asdict(stage) for stage in stages]


def from_json(found: dict) -> Stage:
    slurm = found["slurm"] and Slurm(found["slurm"]["script"], tuple(found["slurm"]["flags"]))
    lists = {key: tuple(found[key]) for key in ("command", "after", "reads")}
    return Stage(**{**found, **lists, "slurm": slurm})


def in_order(stages: list[Stage]) -> list[Stage]:
    """The stages, each behind those that it needs.

    Raises:
        ValueError: a name that is none or is there twice, an unknown one in `after`, or a circle.
    """
    named = {stage.name: stage for stage in stages}
    if len(named) < len(stages):
        raise ValueError("two stages have the same name")
    for stage in stages:
        if not NAME.fullmatch(stage.name):
            raise ValueError(f"{stage.name!r} is no stage's name")
        if missing := set(stage.after) - named.keys():
            raise ValueError(f"{stage.name} comes after {', '.join(sorted(missing))}, which no stage is called")
    try:
        return [named[name] for name in TopologicalSorter({s.name: s.after for s in stages}).static_order()]
    except CycleError as e:
        raise ValueError(f"stages wait for each other: {' → '.join(e.args[1])}") from None


def difference(before: list[str], now: list[str], most: int = 4) -> str:
    """What changed, as part of a sentence: `lr: 1e-5 → lr: 2e-5`."""
    told = []
    matcher = difflib.SequenceMatcher(None, before, now, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            old, new = (", ".join(part) or "nothing" for part in (before[a:b], now[c:d]))
            told.append(f"{old} → {new}")
    more = f", and {len(told) - most} more" if len(told) > most else ""
    return "; ".join(told[:most]) + more


def _fingerprint(path: str) -> str:
    try:
        stat = Path(path).stat()
        if stat.st_size > MOST_BYTES:
            return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", file=path, remedy="check the path") from None


def write_json(path: Path, content) -> None:
    """Whole or not at all: a kill leaves no half of it."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
