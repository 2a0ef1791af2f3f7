"""Local data files as numbered rows, read in constant memory: JSON lines, a JSON list, CSV, Parquet or Arrow.

Each reader yields `(line, row)`, where `row` is what stood there, or a UserError if nothing could be read.
After an error in JSON lines the reading goes on; in a list or a CSV file nothing after it can be trusted.
Lines end at a line feed alone: JSON texts may hold U+2028 and more that `str.splitlines` takes for ends.
Nothing is guessed: a text stays a text, whatever it looks like and whatever the rows before it held.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_bvpo.data.tables import TABLES, read_table
from megatron_bvpo.errors import UserError

Item = tuple[int, Any]

# Names under which a JSON object of a whole file holds its rows.
_WRAPPERS = ("data", "rows", "examples", "instances", "train")

_CHUNK = 1 << 20
_SAVE_UTF8 = "Save the file as UTF-8."
_WRITE_JSON = "Write one complete JSON object a line (JSONL), or one JSON list of objects."
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: str) -> Iterator[Item]:
    """The rows of a .jsonl, .json, .csv, .parquet or .arrow file; in tables the line is the row's number.

    Raises:
        UserError: the file cannot be opened, or holds nothing.
    """
    try:
        if path.endswith(TABLES):
            yield from read_table(path)
            return
        with open(path, "rb") as stream:
            if path.endswith(".csv"):
                yield from _read_csv(path, stream)
            elif first := _starts_a_list(path, stream):
                yield from _read_list(path, stream, first)
            else:
                yield from _read_lines(path, stream)
    except OSError as error:
        remedy = "Check the path and its permissions."
        raise UserError(f"cannot be read: {error.strerror}", file=path, remedy=remedy) from None


_OPENS_ROWS = re.compile(rb'\[|\{\s*"(' + "|".join(_WRAPPERS).encode() + rb')"\s*:\s*\[')


def _starts_a_list(path: str, stream: BinaryIO) -> str:
    """What stands in front of the first row of a list: '[', or '{"data": ['; '' in a file of JSON lines.

    A .jsonl file may hold a list and a .json file lines.
    """
    head = stream.read(4)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError("expected UTF-8, found a UTF-16 byte order mark", file=path, remedy=_SAVE_UTF8)
    start = 3 if head.startswith(codecs.BOM_UTF8) else 0
    stream.seek(start)
    while block := stream.read(_CHUNK):
        if text := block.lstrip():
            text += stream.read(256)  # a wrapper's opening may be cut by the chunk
            opening = _OPENS_ROWS.match(text)
            if opening and opening[0] != b"[" and not path.endswith(".json"):
                opening = None  # a line of a .jsonl file is a row, whatever its first column is called
            stream.seek(start if opening else 0)
            return opening[0].decode() if opening else ""
    raise UserError("the file is empty", file=path, remedy="Check that this is the file you meant.")


# --- JSON ---


def _read_lines(path: str, stream: BinaryIO) -> Iterator[Item]:
    offset = 0
    for line, raw in enumerate(stream, start=1):
        start, offset = offset, offset + len(raw)
        if line == 1 and raw.startswith(codecs.BOM_UTF8):
            raw, start = raw[3:], start + 3
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield line, _not_utf8(path, line, start + error.start, error)
            continue
        try:
            yield line, _parse(text)
        except (ValueError, RecursionError) as error:
            yield line, _broken_json(path, (line, getattr(error, "colno", 1)), error)


def _parse(text: str) -> Any:
    row = json.loads(text, object_pairs_hook=_object)
    _require_whole_characters(text, row)
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _require_whole_characters(text: str, row: Any) -> None:
    """Refuses half of a surrogate pair, which no tokeniser and no Arrow file can take."""
    if "\\u" not in text:
        return
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a \\ud800…\\udfff escape without its other half") from None


def _read_list(path: str, stream: BinaryIO, opening: str) -> Iterator[Item]:
    """The elements of one big list, decoded as the text comes in; `opening` stands in front of them."""
    window = _Window(path, stream)
    try:
        window.peek()
        window.grow(len(opening))
        window.advance(len(opening))
        if window.peek() != "]":
            while True:
                window.peek()
                line = window.line
                yield line, window.take_value()
                if window.peek() != ",":
                    break
                window.advance(1)
        if window.peek() != "]":
            found = repr(window.peek()) if window.peek() else "the end of the file"
            raise window.error(f"expected a comma or ] after a row, found {found}")
        window.advance(1)
        if len(opening) > 1:
            _skip_rest_of_object(window)
        if window.peek():
            raise window.error("text after the end of the list")
    except UserError as error:
        yield error.line, error


def _skip_rest_of_object(window: "_Window") -> None:
    """What else an object holds that wraps the rows: a version, a licence, …"""
    while window.peek() == ",":
        window.advance(1)
        window.peek()
        window.take_value()
        if window.peek() != ":":
            raise window.error(f"expected a colon, found {window.peek()!r}")
        window.advance(1)
        window.peek()
        window.take_value()
    if window.peek() != "}":
        raise window.error("expected } at the end of the object around the rows")
    window.advance(1)


class _Window:
    """The part of a text file that is read and not yet used: `text` from `at` on, which lies in `line`."""

    def __init__(self, path: str, stream: BinaryIO) -> None:
        self.path, self.chunks = path, _decoded_chunks(path, stream)
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.column = 1

    def peek(self) -> str:
        """The next character that is no white space; '' at the end of the file."""
        while True:
            self.advance(_SPACE.match(self.text, self.at).end() - self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow(1)

    def grow(self, wanted: int) -> None:
        """Reads until `wanted` characters lie ahead, or the file ends."""
        parts = [self.text[self.at :]]
        ahead = len(parts[0])
        while ahead < wanted and not self.ended:
            part = next(self.chunks, None)
            self.ended = part is None
            parts.append(part or "")
            ahead += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def advance(self, count: int) -> None:
        end = self.at + count
        self.line, self.column = self.place(end)
        self.at = end

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of a position ahead."""
        newlines = self.text.count("\n", self.at, position)
        if not newlines:
            return self.line, self.column + position - self.at
        return self.line + newlines, position - self.text.rfind("\n", self.at, position)

    def take_value(self) -> Any:
        """Decodes one JSON value; reads on where the decoder stopped for want of text."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                _require_whole_characters(self.text[self.at : end], value)
            except (ValueError, RecursionError) as error:
                if self.ended or not _may_be_cut(error, self.text):
                    place = self.place(error.pos) if isinstance(error, json.JSONDecodeError) else None
                    raise _broken_json(self.path, place or (self.line, 1), error) from None
                # Doubling keeps one huge element from being decoded again for every chunk.
                self.grow(2 * (len(self.text) - self.at))
                continue
            self.advance(end - self.at)
            return value

    def error(self, problem: str) -> UserError:
        return UserError(problem, file=self.path, line=self.line, remedy=_WRITE_JSON)


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether more text could mend the error: it lies at the end, or in a string that is still open."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16


def _decoded_chunks(path: str, stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    while True:
        raw = stream.read(_CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise _not_utf8(path, line, offset - pending + error.start, error) from None
        offset, line = offset + len(raw), line + text.count("\n")
        yield text
        if not raw:
            return


def _broken_json(path: str, place: tuple[int, int], error: Exception) -> UserError:
    line, column = place
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(error.pos - 10, 0) : error.pos + 20]
        problem = f"broken JSON at column {column}: {error.msg}, near {near!r}"
    elif isinstance(error, RecursionError):
        problem = "broken JSON: objects or lists nested too deeply"
    else:
        problem = f"broken JSON: {str(error).split(';')[0]}"
    return UserError(problem, file=path, line=line, remedy=_WRITE_JSON)


def _not_utf8(path: str, line: int, offset: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    problem = f"expected UTF-8, found the byte 0x{byte:02x} at byte {offset} of the file"
    return UserError(problem, file=path, line=line, remedy=_SAVE_UTF8)


# --- CSV ---


def _read_csv(path: str, stream: BinaryIO) -> Iterator[Item]:
    # The default limit of 131072 characters a cell is less than one long trace.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield from _csv_rows(path, _numbered_records(path, stream))
    except UserError as error:
        yield error.line, error
    finally:
        csv.field_size_limit(limit)


def _numbered_records(path: str, stream: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, with the line where each starts (cells may hold line breaks)."""
    reader = csv.reader(_decoded_lines(path, stream), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            remedy = "Put cells with commas, quotes or line breaks in quotes, and double the quotes inside."
            raise UserError(f"broken CSV: {error}", file=path, line=line, remedy=remedy) from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _decoded_lines(path: str, stream: BinaryIO) -> Iterator[str]:
    offset = 0
    for line, raw in enumerate(stream, start=1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, line, offset + error.start, error) from None
        offset += len(raw)
        yield text.removeprefix("\ufeff") if line == 1 else text


def _csv_rows(path: str, records: Iterator[tuple[int, list[str]]]) -> Iterator[Item]:
    _, header = next(records)  # there is one: empty files were refused before
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"the column {twice!r} stands twice", file=path, line=1, remedy="Rename one.")
    for line, cells in records:
        if len(cells) != len(header):
            problem = f"expected {len(header)} cells as in the header, found {len(cells)}"
            raise UserError(problem, file=path, line=line, remedy="Put cells that hold commas in quotes.")
        yield line, dict(zip(header, cells, strict=True))
