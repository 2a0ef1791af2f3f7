"""Looks through the local data files of a run before anything is started.

What cannot be read as it was meant stops the run here with file, line, field and remedy. What only spoils single rows
is counted, and the first cases are listed. What is read here is what is trained (data/handover.py). Folders, hub data
sets and registered ones are judged as they are loaded.
"""

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_bvpo.data.handover import FileReport, Reading, handed_over
from megatron_bvpo.data.verdicts import RowTally, require_rows
from megatron_bvpo.errors import UserError

READ_HERE = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
# ms-swift hands the ending to `datasets` as the name of a reader; these exist, too.
READ_LATER = (".txt", ".text", ".xml", ".pandas", ".hdf5", ".lance", ".webdataset")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class ScanReport:
    """What the scan saw.

    Attributes:
        files: what each file that was read held.
        skipped: `--dataset` entries that were not read here, each with the reason.
        max_listed: how many single problems are listed.
    """

    files: dict[str, FileReport] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    max_listed: int = 20

    @property
    def tally(self) -> RowTally:
        """The count over all files."""
        total = RowTally()
        for report in self.files.values():
            total.merge(report.tally)
        return total

    @property
    def listed(self) -> list[str]:
        """The first problems."""
        return [line for report in self.files.values() for line in report.listed][: self.max_listed]

    @property
    def not_listed(self) -> int:
        """How many problems more there were."""
        seen = sum(len(report.listed) + report.not_listed for report in self.files.values())
        return seen - len(self.listed)

    def lines(self) -> list[str]:
        """The report for a log."""
        rows = {path: report.tally.rows for path, report in self.files.items()}
        lines = [f"{path}: {count} {'row' if count == 1 else 'rows'}" for path, count in rows.items()]
        lines += self.tally.lines() if self.files else []
        if (self.tally.own or self.tally.stripped) and (shares := self.tally.empty_line()):
            lines.append(shares)
        lines += self.listed
        if self.not_listed:
            lines.append(f"… and {self.not_listed} more problems.")
        lines += [f"{entry}; its rows are checked after loading." for entry in self.skipped]
        return lines


def scan_files(specs: Sequence[str], reading: Reading, *, max_listed: int = 20, fresh: bool = False) -> ScanReport:
    """Reads the local files among `--dataset` and `--val_dataset`, and leaves their kept rows for the loading.

    Args:
        specs: entries as the user gave them, `#n` and `:subset` included. A sampled file is read whole.
        reading: how the run reads files, and what it asks of its rows.
        max_listed: how many single problems the report lists.
        fresh: read files again that were handed over before.

    Raises:
        UserError: the first thing, in the order of the entries, that stops the run; a file without a usable row
            does.
    """
    report = ScanReport(max_listed=max_listed)
    for spec in specs:
        path, why_not = local_file(spec)
        if path is None:
            report.skipped.append(f"{spec}: {why_not}")
        elif path not in report.files:
            _, report.files[path] = handed_over(path, reading, fresh=fresh)
            require_rows(report.files[path].tally, [path])
    return report


def local_file(spec: str) -> tuple[str | None, str]:
    """The file that a `--dataset` entry names and that can be read here, or (None, why not).

    Raises:
        UserError: the entry names a file that is not there, or one that ms-swift cannot read.
    """
    if not spec or not spec.strip():
        raise UserError("an empty entry", field="--dataset", remedy="Name a file, a folder or a data set.")
    if not os.path.exists(spec):
        _refuse_joined(spec)
    if _is_hub_name(spec):
        return None, "not a local file"
    path = spec if os.path.exists(spec) else _swift_name(spec)
    if os.path.isdir(path):
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError("the folder cannot be read", file=path, remedy="Check its permissions.")
        return None, "a folder"
    ending = os.path.splitext(path)[1]
    if not os.path.exists(path):
        looks_local = path.startswith(("/", "./", "../", "~")) or ending in READ_HERE + READ_LATER
        if looks_local:
            raise UserError("no such file", file=path, remedy=nearby(path))
        return None, "not a local file"
    if _has_own_preprocessor(path):
        return None, "registered in ms-swift with a preprocessor of its own"
    if ending in READ_HERE:
        return path, ""
    if ending in READ_LATER:
        return None, f"a {ending} file"
    known = ", ".join(READ_HERE)
    raise UserError(
        f"ms-swift reads files by the ending of their names, and it does not know {ending or 'none'!r}",
        file=path,
        remedy=f"Give a file that ends in one of {known}.",
    )


def _refuse_joined(spec: str) -> None:
    """Several files in one entry, joined as other tools want them."""
    parts = [part for part in re.split(r"[,;\s]+", spec.strip(" ,;[]")) if part]
    there = [part for part in parts if os.path.exists(part.strip("\"'"))]
    if len(parts) > 1 and there:
        names = " ".join(part.strip("\"'") for part in parts)
        problem = f"several names in one entry: {spec!r}"
        raise UserError(problem, field="--dataset", remedy=f"Give them as entries of their own: --dataset {names}.")


def _is_hub_name(spec: str) -> bool:
    """owner/name, with or without #n: known as such without loading ms-swift's parser."""
    name, mark, count = spec.partition("#")
    if mark and not count.isdigit():
        return False  # the parser says what is wrong with it
    is_file = os.path.exists(name) or os.path.splitext(name)[1] in READ_HERE + READ_LATER
    return not is_file and _HUB_NAME.fullmatch(name) is not None


def _swift_name(spec: str) -> str:
    """The name without `hf::`, `:subset` and `#n`, in ms-swift's own reading."""
    from swift.dataset.dataset_syntax import DatasetSyntax  # slow to import, and most entries need it not

    try:
        return DatasetSyntax.parse(spec).dataset
    except (ValueError, TypeError):
        # TypeError: nothing is left in front of the '#'.
        remedy = "Write name#100 for 100 rows."
        raise UserError(f"cannot be read as name#rows: {spec!r}", field="--dataset", remedy=remedy) from None


def _has_own_preprocessor(path: str) -> bool:
    """Whether the file is a registered data set. Only a program that has loaded ms-swift can have any."""
    meta = sys.modules.get("swift.dataset.dataset_meta")
    mapping: Mapping[Any, Any] = getattr(meta, "DATASET_MAPPING", {})
    paths = (getattr(entry, "dataset_path", None) for entry in mapping.values())
    return any(known is not None and os.path.abspath(known) == os.path.abspath(path) for known in paths)


def nearby(path: str) -> str:
    """What to do about a missing file: the like-named file next to it, if there is one."""
    if path.startswith("~"):
        return "Write the path without ~; ms-swift does not expand it."
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"The folder {folder} is not there either; check the path."
    try:
        close = difflib.get_close_matches(os.path.basename(path), os.listdir(folder), n=1)
    except OSError:
        close = []
    meant = f"Did you mean {os.path.join(os.path.dirname(path), close[0])}?" if close else "Check the path."
    return f"{meant} Relative paths start at {os.getcwd()}."
