"""Looks through the local data files of a run before ms-swift loads them.

What would stop ms-swift, or be misread in silence, stops the run here with file, line, field and remedy.
What only spoils single rows is counted, and the first cases are listed. Files that only ms-swift can read
(Parquet, text, folders, hub data sets) are left to the check after loading.
"""

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_bvpo.data.aliases import MESSAGES_KEYS, QUERY_KEYS, REJECTED_KEYS, canonical_row
from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.data.rows import check_row, kind_of
from megatron_bvpo.data.verdicts import RowRules, RowTally
from megatron_bvpo.errors import UserError

READ_HERE = (".jsonl", ".json", ".csv")
# ms-swift hands the ending to `datasets` as the name of a reader; these exist.
READ_LATER = (".txt", ".text", ".parquet", ".arrow", ".xml", ".pandas", ".hdf5", ".lance", ".webdataset")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class ScanReport:
    """What the scan saw.

    Attributes:
        tally: the count over all files.
        files: rows of each file that was read.
        listed: the first problems, as `file:line: field: problem (remedy)`.
        not_listed: how many problems more there were.
        skipped: `--dataset` entries that were not read here, each with the reason.
    """

    tally: RowTally = field(default_factory=RowTally)
    files: dict[str, int] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    not_listed: int = 0
    skipped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for a log."""
        lines = [f"{path}: {rows} {'row' if rows == 1 else 'rows'}" for path, rows in self.files.items()]
        lines += self.tally.lines() if self.files else []
        lines += self.listed
        if self.not_listed:
            lines.append(f"… and {self.not_listed} more problems.")
        lines += [f"{entry}; its rows are checked after loading." for entry in self.skipped]
        return lines


def scan_files(
    specs: Sequence[str],
    rules: RowRules,
    *,
    max_listed: int = 20,
    columns: Mapping[str, str] | None = None,
    auto_mapping: bool = True,
) -> ScanReport:
    """Reads the local files among `--dataset` and `--val_dataset`, one row at a time.

    Args:
        specs: entries as the user gave them, `#n` and `:subset` included. A sampled file is read whole.
        rules: what the run asks of its rows.
        max_listed: how many single problems the report lists.
        columns: the `--columns` mapping.
        auto_mapping: False under `--disable_auto_column_mapping`.

    Raises:
        UserError: the first thing, in the order of the entries, that would stop ms-swift or be misread.
    """
    report = ScanReport()
    for spec in specs:
        path, why_not = local_file(spec)
        if path is None:
            report.skipped.append(f"{spec}: {why_not}")
            continue
        _FileScan(path, rules, report, max_listed, columns, auto_mapping).run()
    return report


def local_file(spec: str) -> tuple[str | None, str]:
    """The file that a `--dataset` entry names and that can be read here, or (None, why not).

    Raises:
        UserError: the entry names a file that is not there, or one that ms-swift cannot read.
    """
    if not spec or not spec.strip():
        raise UserError("an empty entry", field="--dataset", remedy="Name a file, a folder or a data set.")
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
            raise UserError("no such file", file=path, remedy=_nearby(path))
        return None, "not a local file"
    if _has_own_preprocessor(path):
        return None, "registered in ms-swift with a preprocessor of its own"
    if ending in READ_HERE:
        return path, ""
    if ending in READ_LATER:
        return None, f"a {ending} file"
    known = ", ".join(READ_HERE + READ_LATER[:3])
    raise UserError(
        f"ms-swift reads files by the ending of their names, and it does not know {ending or 'none'!r}",
        file=path,
        remedy=f"Give a file that ends in one of {known}.",
    )


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


def _nearby(path: str) -> str:
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


@dataclass
class _FileScan:
    """One file: judges its rows, and keeps the first error that stops the run."""

    path: str
    rules: RowRules
    report: ScanReport
    max_listed: int
    columns: Mapping[str, str] | None
    auto_mapping: bool
    stop: UserError | None = None
    bad_lines: int = 0
    # What the first row that showed it looked like; ms-swift picks one reader for the whole file.
    spelling: dict[str, tuple[str, int]] = field(default_factory=dict)

    def run(self) -> None:
        rows = 0
        for line, row in read_rows(self.path):
            rows += 1
            error = row if isinstance(row, UserError) else self._row_error(line, row)
            if error is not None:
                self.bad_lines += 1
                self.stop = self.stop or error
        if not rows:
            remedy = "Check that this is the file you meant."
            raise UserError("the file holds no rows", file=self.path, remedy=remedy)
        if self.stop is not None:
            raise self._with_count(self.stop)
        self.report.files[self.path] = self.report.files.get(self.path, 0) + rows

    def _row_error(self, line: int, row: Any) -> UserError | None:
        """Counts a row, and lists what is wrong with it; returns an error if it would stop ms-swift."""
        if not isinstance(row, dict):
            remedy = "Every row is a JSON object with messages and rejected_response."
            problem = f"expected an object, found {kind_of(row)}"
            return UserError(problem, file=self.path, line=line, remedy=remedy)
        if error := self._spelling_error(line, row):
            return error
        standard = canonical_row(row, self.columns, self.auto_mapping)
        if standard is None:
            if self.path.endswith(".csv"):
                return self._csv_columns_error(row)
            self.report.tally.add_unchecked()
            return None
        verdict = check_row(standard, self.rules)
        for problem in verdict.problems:
            if problem.structural:
                return UserError(
                    problem.what,
                    file=self.path,
                    line=line,
                    field=problem.field,
                    remedy=f"{problem.remedy[0].upper()}{problem.remedy[1:]}.",
                )
        self.report.tally.add(verdict)
        for problem in verdict.problems:
            if len(self.report.listed) < self.max_listed:
                self.report.listed.append(f"{self.path}:{line}: {problem}")
            else:
                self.report.not_listed += 1
        return None

    def _spelling_error(self, line: int, row: dict[str, Any]) -> UserError | None:
        """One file must spell its rows in one way: ms-swift deletes the rows of the other kind in silence."""
        names = {(self.columns or {}).get(name, name): value is not None for name, value in row.items()}
        spellings = {}
        if any(name in names for name in MESSAGES_KEYS):
            spellings["prompt"] = "messages"
        elif any(name in names for name in QUERY_KEYS) and any(name in names for name in REJECTED_KEYS):
            spellings["prompt"] = "query and response"
        for name in REJECTED_KEYS:
            if names.get(name):
                spellings.setdefault("rejected side", name)
        for part, spelling in spellings.items():
            first, first_line = self.spelling.setdefault(part, (spelling, line))
            if first != spelling:
                problem = f"the {part} is in {spelling}, but in {first} at line {first_line}"
                remedy = "Write all rows of a file in one way, or use two files."
                return UserError(problem, file=self.path, line=line, remedy=remedy)
        return None

    def _csv_columns_error(self, row: dict[str, Any]) -> UserError:
        return UserError(
            f"expected the columns messages and rejected_response, found {', '.join(row)}",
            file=self.path,
            line=1,
            field="header",
            remedy="Rename the columns, or map them with --columns.",
        )

    def _with_count(self, error: UserError) -> UserError:
        more = self.bad_lines - 1
        if not more:
            return error
        message = f"{error.message} ({more} more bad {'row' if more == 1 else 'rows'} in this file)"
        return UserError(message, file=error.file, line=error.line, field=error.field, remedy=error.remedy)
