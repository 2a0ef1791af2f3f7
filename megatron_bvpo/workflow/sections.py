"""A file of sections, such as rounds and sweeps are asked for with: each is the flags of a command, and where it runs.

What is wrong is raised with the file's name and the key's line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.run_file import read_keys
from megatron_bvpo.sampling.asking.job_file import ENGINE, OWN_OF_THE_JOB
from megatron_bvpo.workflow.command_flags import check_flags
from megatron_bvpo.workflow.yaml_lines import key_lines

# One served model, whose name and adapters the chain decides.
OF_THE_ENGINE = (*OWN_OF_THE_JOB, "served_model_name", "lora_modules", "enable_lora")

# Flags of sbatch by which the chain finds its job, or with which there is none, another or more than one. sbatch also
# takes what they begin with.
OF_THE_CHAIN = (
    "job_name", "output", "export", "export_file", "parsable", "clusters", "array", "wait", "wrap", "test_only",
    "help", "usage", "version",
)  # fmt: skip


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


class SectionReader:
    """Reads one file.

    Attributes:
        what: is asked for, such as `rounds`.
        example: a file that shows it.
    """

    what, example = "", ""

    def __init__(self, file: str):
        self.file = file
        self.values = {str(key).replace("-", "_"): value for key, value in read_keys(file).items()}
        self.lines = key_lines(file)

    def require_known(self, keys: Iterable[str]) -> None:
        """Refuses keys of the file that are not of `keys`."""
        keys = list(keys)
        for key in self.values:
            if key not in keys:
                close = difflib.get_close_matches(key, keys, 1)
                remedy = f"write {close[0]}" if close else f"of {', '.join(keys)}"
                self.fail(key, f"is no part of a {self.what} file", remedy)

    # ---- parts of sections

    def section(self, name: str, needed: bool = False) -> dict[str, Any]:
        found = self.values.get(name)
        if found is None and needed:
            self.fail(name, "is missing", f"add `{name}:` with its flags below it; {self.example} has one")
        found = self.mapping(name, found, "write `flag: value` a line, indented")
        return {str(key).replace("-", "_"): value for key, value in found.items()}

    def mapping(self, key: str, found: Any, remedy: str) -> dict[str, Any]:
        """Refuses all but a mapping and nothing; 0 and false are not nothing."""
        if found is not None and not isinstance(found, dict):
            self.fail(key, "is no mapping", remedy)
        return found or {}

    def beside(self, name: Any) -> str:
        """A file's path, from the working folder or from that of this file."""
        there = Path(self.file).parent / str(name)
        return str(there) if not Path(str(name)).exists() and there.exists() else str(name)

    def place(self, name: str, section: dict[str, Any]) -> Place:
        """Takes `slurm` out of a section."""
        own, common = section.pop("slurm", None), self.values.get("slurm")
        for key, found in ((f"{name}.slurm", own), ("slurm", common)):
            for flag in self.mapping(key, found, "write flags of sbatch: {nodes: 4, gpus_per_node: 8}"):
                plain = str(flag).replace("-", "_").strip("_")
                if len(plain) > 1 and any(own.startswith(plain) for own in OF_THE_CHAIN):
                    self.fail(f"{key}.{flag}", f"is given by the {self.what}", "leave it out")
        return Place(None if own is None else {**(common or {}), **own})

    def engine(self, name: str, section: dict[str, Any]) -> dict[str, Any]:
        """Takes `engine` out of a section."""
        found = self.mapping(f"{name}.{ENGINE}", section.pop(ENGINE, None), "write flags of vllm serve, indented")
        found = {str(key).replace("-", "_"): value for key, value in found.items()}
        for key in found.keys() & set(OF_THE_ENGINE):
            self.fail(f"{name}.{ENGINE}.{key}", f"is given by the {self.what}", "leave it out")
        return found

    def flags(self, name: str, add_command: Callable, command: list[str], own, section: Mapping[str, Any]) -> list[str]:
        with self.told(name):
            return check_flags(add_command, command, own, section, self.what)

    # ---- values

    def needed(self, key: str) -> Any:
        if self.values.get(key) is None:
            self.fail(key, "is missing", f"add `{key}: …`")
        return self.values[key]

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
            key = f"{name}.{error.field.lstrip('-')}" if error.field else name
            self.fail(key, error.message, error.remedy)
