"""From a data file to the rows that are trained: read once, judged, and kept as an Arrow file that datasets maps.

A row that is kept is written in one form, whatever the file's: `messages`, and `rejected_response` (or
`rejected_messages` where its messages carry loss switches), the fields of the other streams (streams.py), labels and
`accept_rate`, `tools`, `chat_template_kwargs`, where it came from, and its verdict. The columns and their types are
fixed here: nothing is guessed from the first rows of a file, so a late column is no surprise and a text of digits stays
a text. What else a row held is left out.

The Arrow file lies in data/shared_cache.py's folder under a name made of the file's identity (path, size, times) and of
everything that has a say in the rows. It is written aside and renamed, so ranks, nodes and runs may all write it. The
counts of the file stand in it, too: who finds it needs not read the file.
"""

import filecmp
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bvpo import __version__
from megatron_bvpo.data.aliases import canonical_row
from megatron_bvpo.data.columns import unknown_form
from megatron_bvpo.data.conversations import kind_of
from megatron_bvpo.data.readers import read_rows
from megatron_bvpo.data.row_shape import has_no_trace_responses
from megatron_bvpo.data.row_values import read_label, read_share
from megatron_bvpo.data.rows import check_row
from megatron_bvpo.data.shared_cache import VARIABLE, cache_folder, require_room, room_for
from megatron_bvpo.data.verdicts import RowRules, RowTally, RowVerdict
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import TABLE

SOURCE_KEY = "bvpo_source"
VERDICT_KEY = "bvpo_verdict"
LIST_COLUMNS = ("messages", "rejected_messages", "tools", "rejected_tools")  # lists of objects, each stored as JSON
OBJECT_COLUMNS = ("chat_template_kwargs", "rejected_chat_template_kwargs")
# Texts of the streams beside the trace stream.
STREAM_COLUMNS = tuple(name for stream in TABLE.values() if stream.name != "trace" for name in stream.fields)
VALUE_COLUMNS = {"label": read_label, "empty_label": read_label, "accept_rate": read_share}
TYPES = {"label": "bool", "empty_label": "bool", "accept_rate": "float64"}  # of columns that are no texts
COLUMNS = (*LIST_COLUMNS, *OBJECT_COLUMNS, "rejected_response", *STREAM_COLUMNS, *VALUE_COLUMNS)
COLUMNS += (SOURCE_KEY, VERDICT_KEY)

_REPORT = b"bvpo_report"
_STEERING = ("loss", "loss_scale")
# What is collected before it is written: at most so many rows, and about so many characters.
_BATCH_ROWS, _BATCH_SIZE = 500, 4 << 20


@dataclass(frozen=True)
class Reading:
    """How a file is read.

    Args:
        rules: what the run asks of its rows.
        columns: the `--columns` mapping.
        auto_mapping: False under `--disable_auto_column_mapping`.
    """

    rules: RowRules
    columns: Mapping[str, str] | None = None
    auto_mapping: bool = True

    def canonical(self, row: dict[str, Any]) -> tuple[dict[str, Any], RowVerdict]:
        """(the row in the one form, its verdict). A row that is dropped comes without columns."""
        standard = canonical_row(row, self.columns, self.auto_mapping, self.rules.tags)
        if standard is None:
            return {}, RowVerdict(problems=(unknown_form(row),))
        verdict = check_row(standard, self.rules)
        return (_in_one_form(standard) if verdict.kept else {}), verdict


def _in_one_form(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are handed over, with the rejected side in one of its two."""
    new = {name: row.get(name) for name in COLUMNS[:-2]}
    for name in STREAM_COLUMNS:
        new[name] = new[name] if isinstance(new[name], str) else None  # the verdict has told of anything else
    for name, read in VALUE_COLUMNS.items():
        new[name] = read(new[name])
    for name in (*LIST_COLUMNS[2:], *OBJECT_COLUMNS):
        if isinstance(new[name], str):
            new[name] = _loaded(new[name])
    for name in LIST_COLUMNS[2:]:
        if new[name] is not None and not isinstance(new[name], list):
            new[name] = [new[name]]
    response, messages = new["rejected_response"], new["messages"]
    if has_no_trace_responses(new):
        new["rejected_response"] = new["rejected_messages"] = None
        return new
    if isinstance(response, str):
        new["rejected_messages"] = None
        return new
    if response is None and new["rejected_messages"] is None:
        return new  # one response, with a label
    if isinstance(response, list):
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        talk = [*messages[: last_user + 1], *response]
    else:
        talk = new["rejected_messages"]
    steered = any(message.get(key) is not None for key in _STEERING for message in (*messages, *talk))
    new["rejected_response"] = None if steered else talk[-1]["content"]
    new["rejected_messages"] = talk if steered else None
    return new


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text if text.strip() else None


# --- the counts of a file ---


@dataclass
class FileReport:
    """What a file held.

    Attributes:
        tally: the count of its rows and of what was lost, by reason.
        listed: the first problems, as `file:line: field: problem (remedy)`.
        not_listed: how many problems more there were.
    """

    tally: RowTally = field(default_factory=RowTally)
    listed: list[str] = field(default_factory=list)
    not_listed: int = 0

    def add(self, source: str, verdict: RowVerdict, max_listed: int = 20) -> None:
        """Counts a row."""
        self.tally.add(verdict)
        for problem in verdict.problems:
            if len(self.listed) < max_listed:
                self.listed.append(f"{source}: {problem}")
            else:
                self.not_listed += 1

    def lines(self) -> list[str]:
        """The report for a log."""
        more = [f"… and {self.not_listed} more problems."] if self.not_listed else []
        return [*self.tally.lines(), *self.listed, *more]

    def to_json(self) -> str:
        return json.dumps([vars(self.tally), self.listed, self.not_listed])

    @classmethod
    def from_json(cls, text: str | bytes) -> "FileReport":
        counts, listed, not_listed = json.loads(text)
        return cls(RowTally.from_dict(counts), listed, not_listed)


# --- reading a file ---


def judged_rows(
    path: str, reading: Reading, report: FileReport, carried: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of a file that are kept, in the one form; counts all of them in `report`.

    Raises:
        UserError: the file cannot be read, holds no rows, or a row has a value of the wrong type. All rows are
            looked at first, and the first such error is raised.
    """
    stop, bad_rows, unknown = None, 0, 0
    first: dict[str, Any] = {}
    for line, row in read_rows(path):
        error, verdict = (row, None) if isinstance(row, UserError) else (None, None)
        if error is None:
            first = first or (row if isinstance(row, dict) else {})
            new, verdict, error = _judged(path, line, row, reading)
        if error is not None:
            bad_rows += 1
            stop = stop or error
            continue
        source = f"{path}:{line}"
        report.add(source, verdict)
        unknown += bool(verdict.problems) and verdict.problems[0].field == "columns"
        if new and stop is None:
            also = {name: row[name] for name in carried if row.get(name) is not None}
            yield {**new, **also, SOURCE_KEY: source, VERDICT_KEY: verdict.to_json()}
    if stop is not None:
        raise _with_count(stop, bad_rows - 1)
    if not report.tally.rows:
        raise UserError("the file holds no rows", file=path, remedy="Check that this is the file you meant.")
    if unknown == report.tally.rows:
        problem = unknown_form(first, reading)
        line = 1 if path.endswith(".csv") else None
        raise UserError(problem.what, file=path, line=line, field=problem.field, remedy=problem.remedy)


def _judged(path: str, line: int, row: Any, reading: Reading):
    """(row in the one form, verdict, None), or (None, None, what stops the run)."""
    if not isinstance(row, dict):
        remedy = "Every row is a JSON object with messages and rejected_response."
        return None, None, UserError(f"expected an object, found {kind_of(row)}", file=path, line=line, remedy=remedy)
    new, verdict = reading.canonical(row)
    for problem in verdict.problems:
        if problem.structural:
            remedy = f"{problem.remedy[0].upper()}{problem.remedy[1:]}."
            return None, None, UserError(problem.what, file=path, line=line, field=problem.field, remedy=remedy)
    return new, verdict, None


def _with_count(error: UserError, more: int) -> UserError:
    if not more:
        return error
    message = f"{error.message} ({more} more bad {'row' if more == 1 else 'rows'} in this file)"
    return UserError(message, file=error.file, line=error.line, field=error.field, remedy=error.remedy)


# --- the Arrow file ---


def handed_over(path: str, reading: Reading, *, fresh: bool = False) -> tuple[str, FileReport]:
    """(the Arrow file with the kept rows of a data file, the counts); reads the file unless that was done before.

    Args:
        fresh: read the file in any case, as `--load_from_cache_file false` asks.

    Raises:
        UserError: as `judged_rows`; or the Arrow file cannot be written, or the file changed while it was read.
    """
    before = _identity(path)
    target = _arrow_path(path, reading, before)
    if not fresh and (report := _stored_report(target)):
        return str(target), report
    report = FileReport()
    require_room(target.parent, room_for([path]), f"what is made of {path}")
    with _written_aside(target, path) as part:
        write_rows(part, judged_rows(path, reading, report), report)
    if _identity(path) != before:
        target.unlink(missing_ok=True)
        raise UserError("the file changed while it was read", file=path, remedy="Start again once it is complete.")
    return str(target), report


def write_rows(path: str, rows: Iterator[dict[str, Any]], report: FileReport) -> None:
    """Writes rows in the one form to an Arrow stream, and behind them the report as it is when they have ended."""
    import pyarrow as pa

    schema = arrow_schema()
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch: list[list[Any]] = []
        size = 0
        for row in rows:
            cells = _cells(row)
            size += sum(map(_size, cells))
            batch.append(cells)
            if len(batch) >= _BATCH_ROWS or size >= _BATCH_SIZE:
                writer.write_batch(_record_batch(pa, batch, schema))
                batch, size = [], 0
        if batch:
            writer.write_batch(_record_batch(pa, batch, schema))
        # A stream's schema is its head; metadata of a last, empty batch can be written when all is counted.
        empty = _record_batch(pa, [], schema)
        writer.write_batch(empty, custom_metadata={_REPORT: report.to_json().encode()})


def _size(cell: Any) -> int:
    return len(cell) if isinstance(cell, str) else sum(map(len, cell)) if isinstance(cell, list) else 0


def _cells(row: dict[str, Any]) -> list[Any]:
    """A row's cells in the order of COLUMNS, as Arrow stores them."""
    cells = []
    for name in COLUMNS:
        value = row.get(name)
        if value is not None and name in LIST_COLUMNS:
            value = [json.dumps(item, ensure_ascii=False) for item in value]
        elif value is not None and name in OBJECT_COLUMNS:
            value = json.dumps(value, ensure_ascii=False)
        cells.append(value)
    return cells


def _record_batch(pa, rows: list[list[Any]], schema):
    columns = []
    for i, column in enumerate(schema):
        values = [row[i] for row in rows]
        if column.name in LIST_COLUMNS:
            plain = pa.array(values, pa.list_(pa.string()))
            items = pa.ExtensionArray.from_storage(pa.json_(), plain.values)
            columns.append(pa.ListArray.from_arrays(plain.offsets, items, mask=plain.is_null()))
        elif column.name in OBJECT_COLUMNS:
            columns.append(pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string())))
        else:
            columns.append(pa.array(values, column.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def arrow_schema():
    """The columns and their types; with what datasets reads its features from."""
    import pyarrow as pa

    types, features = {}, {}
    for name in COLUMNS:
        if name in LIST_COLUMNS:
            types[name], features[name] = pa.list_(pa.json_()), {"_type": "List", "feature": {"_type": "Json"}}
        elif name in OBJECT_COLUMNS:
            types[name], features[name] = pa.json_(), {"_type": "Json"}
        else:
            dtype = TYPES.get(name, "string")
            types[name] = {"string": pa.string(), "bool": pa.bool_(), "float64": pa.float64()}[dtype]
            features[name] = {"_type": "Value", "dtype": dtype}
    return pa.schema(list(types.items()), {"huggingface": json.dumps({"info": {"features": features}})})


def _stored_report(target: Path) -> FileReport | None:
    """The counts in a file that was handed over before; None where there is none, or it is damaged."""
    import pyarrow as pa

    found = None
    try:
        with pa.memory_map(str(target)) as source:
            reader = pa.ipc.open_stream(source)
            while True:
                found = reader.read_next_batch_with_custom_metadata().custom_metadata
    except StopIteration:
        return FileReport.from_json(found[_REPORT]) if found else None
    except (OSError, pa.ArrowInvalid):
        return None


def _identity(path: str) -> tuple[str, int, int, int]:
    """What changes when a file does."""
    try:
        found = os.stat(path)
    except OSError as error:
        remedy = "Check the path and its permissions."
        raise UserError(f"cannot be read: {error.strerror}", file=path, remedy=remedy) from None
    return os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _arrow_path(path: str, reading: Reading, identity: tuple) -> Path:
    columns = sorted((reading.columns or {}).items())
    # The path as it was given: it stands in every row's source.
    said = (__version__, path, identity, columns, reading.auto_mapping, repr(reading.rules), COLUMNS)
    key = hashlib.sha256(repr(said).encode()).hexdigest()[:32]
    return cache_folder() / f"{Path(path).stem[:40]}-{key}.arrow"


@contextmanager
def _written_aside(target: Path, path: str) -> Iterator[str]:
    """A file to write to, which gets the name `target` when it is complete."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".part-", dir=target.parent)
        os.close(handle)
    except OSError as error:
        remedy = f"Set {VARIABLE} (else MODELSCOPE_CACHE) to a folder that can be written."
        raise UserError(f"cannot be written: {error.strerror}", file=str(target.parent), remedy=remedy) from None
    try:
        yield part
        # The same once more: the old one stays, and with it what datasets has computed from it.
        if not (target.exists() and filecmp.cmp(part, target, shallow=False)):
            os.chmod(part, 0o644)
            os.replace(part, target)
    except OSError as error:
        remedy = f"It holds the rows of {path} once more; set {VARIABLE} to a folder with room for them."
        raise UserError(f"cannot be written: {error.strerror}", file=str(target.parent), remedy=remedy) from None
    finally:
        Path(part).unlink(missing_ok=True)
