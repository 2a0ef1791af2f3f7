"""Data files that stop a run, and entries that name none: what is told, in which place."""

import pytest

from megatron_bvpo.data import readers
from megatron_bvpo.data.scan import scan_files
from megatron_bvpo.errors import UserError
from tests.unit.sample_rows import OWN, READING, REJECTED, jsonl, row, talk

pytestmark = pytest.mark.usefixtures("row_cache")

GOOD = jsonl(row())

# name: (file name, content, line or None, field or None, fragments of the message and the remedy)
FATAL = {
    "empty file": ("a.jsonl", b"", None, None, ["file is empty", "meant"]),
    "white space only": ("a.jsonl", b"\n \r\n", None, None, ["file is empty"]),
    "empty list": ("a.json", b"[ ]", None, None, ["no rows"]),
    "latin-1": (
        "a.jsonl",
        GOOD + b'{"messages": "caf\xe9"}\n',
        2,
        None,
        ["UTF-8", "0xe9", f"byte {len(GOOD) + 17}", "Save"],
    ),
    "latin-1 in a list": (
        "a.json",
        b'[{"a": 1},\n{"b": "\xe9"}]',
        2,
        None,
        ["UTF-8", "0xe9", "byte 18 ", "Save"],
    ),
    "cut in a character": ("a.json", b'[{"a": "\xc3', 1, None, ["UTF-8", "0xc3", "byte 8 "]),
    "utf-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), None, None, ["UTF-16", "Save the file as UTF-8"]),
    "half an object": ("a.jsonl", GOOD + b'{"messages": [', 2, None, ["broken JSON", "column 15", "JSONL"]),
    "no comma": ("a.jsonl", GOOD + b'{"a": 1 "b": 2}\n', 2, None, ["broken JSON at column 9", "','"]),
    "two objects on a line": ("a.jsonl", GOOD + b"{} {}\n", 2, None, ["column 4", "Extra data"]),
    "one object over many lines": ("a.jsonl", b'{\n"messages": []\n}\n', 1, None, ["broken JSON", "JSONL"]),
    "key twice": ("a.jsonl", b'{"label": 1, "label": 2}\n', 1, None, ["'label' stands twice"]),
    "half a surrogate pair": ("a.jsonl", jsonl(row(rejected="\ud800")), 1, None, ["other half"]),
    "a list instead of a row": ("a.jsonl", GOOD + b"[]\n", 2, None, ["expected an object", "a list"]),
    "far too deep": ("a.jsonl", b'{"a":' * 200000, 1, None, ["nested too deeply"]),
    "number of 5000 digits": ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", 1, None, ["broken JSON"]),
    "text instead of a row": (
        "a.jsonl",
        GOOD + b'"hello"\n',
        2,
        None,
        ["expected an object", "text 'hello'"],
    ),
    "null instead of a row": ("a.jsonl", GOOD + b"null\n", 2, None, ["expected an object", "null"]),
    "list not closed": ("a.json", b"[\n" + GOOD, 3, None, ["comma or ]", "end of the file"]),
    "text after a list": ("a.json", b"[" + GOOD + b"]\n{}", 3, None, ["after the end of the list"]),
    "no comma in a list": ("a.json", b"[" + GOOD + GOOD + b"]", 2, None, ["comma or ]", "'{'"]),
    "broken row in a list": (
        "a.json",
        b'[{"a": 1},\n  {"b": 1\n  "c" 2}]',
        3,
        None,
        ["broken JSON at column 3", '"c"'],
    ),
    "messages is text": ("a.jsonl", jsonl({**row(), "messages": "hi"}), 1, "messages", ["list of messages"]),
    "messages is an object": (
        "a.jsonl",
        jsonl({**row(), "messages": {"a": 1}}),
        1,
        "messages",
        ["an object"],
    ),
    "message is text": ("a.jsonl", jsonl({**row(), "messages": ["hi"]}), 1, "messages[0]", ["'role'"]),
    "role is a number": (
        "a.jsonl",
        jsonl({**row(), "messages": [{"role": 1, "content": "q"}]}),
        1,
        "messages[0].role",
        ["expected text, found the number 1"],
    ),
    "content is a list": (
        "a.jsonl",
        jsonl(row(), {**row(), "messages": talk(prompt=[{"type": "text"}])}),
        2,
        "messages[0].content",
        ["expected text, found a list", "Write the message as one text."],
    ),
    "rejected is a number": ("a.jsonl", jsonl(row(rejected=5)), 1, "rejected_response", ["the number 5"]),
    "several rejected responses": (
        "a.jsonl",
        jsonl(row(), row(rejected=[REJECTED, "another", "a third"])),
        2,
        "rejected_response",
        ["several responses in one list, found 3", "write a row for each"],
    ),
    "rejected conversation is text": (
        "a.jsonl",
        jsonl({"messages": talk(), "rejected_messages": "hi"}),
        1,
        "rejected_messages",
        ["list of messages, found text 'hi'"],
    ),
    "empty answer is a number": (
        "a.jsonl",
        jsonl(row(**OWN), row(empty_response=12, empty_rejected_response="13")),
        2,
        "empty_response",
        ["expected text, found the number 12"],
    ),
    "csv without rows": ("a.csv", b"messages,rejected_response\n", None, None, ["no rows"]),
    "csv without the columns": (
        "a.csv",
        b"prompt,good,bad\nq,a,b\n",
        1,
        "columns",
        ["found prompt, good, bad", "--columns"],
    ),
    "csv with messages that are no JSON": (
        "a.csv",
        b"messages,rejected_response\nhello,x\n",
        2,
        "messages",
        ["list of messages, found text 'hello'"],
    ),
    "csv row too long": ("a.csv", b"query,response,rejected_response\n1,2,3,4\n", 2, None, ["3 cells", "4"]),
    "csv row too short": (
        "a.csv",
        b"query,response,rejected_response\n1,2\n",
        2,
        None,
        ["found 2", "quotes"],
    ),
    "csv quote not closed": (
        "a.csv",
        b'query,rejected_response\nq,a\nq,"a\n\n',
        3,
        None,
        ["broken CSV", "double the"],
    ),
    "csv column twice": ("a.csv", b"query,query\n1,2\n", 1, None, ["'query' stands twice", "Rename"]),
    "csv latin-1": ("a.csv", b"query,response\nq,\xe9\n", 2, None, ["UTF-8", "0xe9", "byte 17 "]),
}


@pytest.mark.parametrize("case", FATAL)
def test_file_that_stops_the_run(case, write):
    name, content, line, field, fragments = FATAL[case]
    path = write(content, name)
    with pytest.raises(UserError) as caught:
        scan_files([path], READING)
    error = caught.value
    assert (error.file, error.line, error.field) == (path, line, field)
    for fragment in fragments:
        assert fragment in str(error)
    assert error.remedy and error.remedy.endswith(".")


def test_more_bad_rows_are_counted_and_the_first_is_told(write):
    path = write(jsonl(row(), 1, row(rejected=5)) + b"{\n" + GOOD)
    with pytest.raises(UserError, match="2 more bad rows in this file") as caught:
        scan_files([path], READING)
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "an empty entry"),
        ("{dir}/none.jsonl", "no such file"),
        ("{dir}/none.jsonl#10", "no such file"),
        ("{dir}/pair.jsonl", "Did you mean {dir}/pairs.jsonl?"),
        ("{dir}/none/a.jsonl", "{dir}/none is not there either"),
        ("none.jsonl", "no such file"),
        ("{dir}/pairs.jsonl,{dir}/more.jsonl", "--dataset {dir}/pairs.jsonl {dir}/more.jsonl"),
        ("{dir}/pairs.jsonl {dir}/more.jsonl", "several names in one entry"),
        ("['{dir}/pairs.jsonl', '{dir}/none.jsonl']", "--dataset {dir}/pairs.jsonl {dir}/none.jsonl"),
        ("~/pairs.jsonl", "does not expand it"),
        ("org/name#many", "name#rows"),
        ("{dir}/pairs.jsonl.gz", "does not know '.gz'"),
        ("{dir}/plain", "does not know 'none'"),
    ],
)
def test_entry_that_names_no_readable_file(spec, told, tmp_path, write):
    for name in ("pairs.jsonl", "pairs.jsonl.gz", "plain"):
        write(GOOD, name)
    with pytest.raises(UserError) as caught:
        scan_files([spec.format(dir=tmp_path)], READING)
    assert told.format(dir=tmp_path) in str(caught.value)
    assert caught.value.remedy


def test_file_that_cannot_be_opened(write, monkeypatch):
    path = write(GOOD)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "open", refuse, raising=False)
    with pytest.raises(UserError, match="cannot be read: Permission denied") as caught:
        scan_files([path], READING)
    assert caught.value.file == path


@pytest.mark.parametrize("case", [name for name in FATAL if FATAL[name][0].endswith(".json")])
def test_broken_lists_are_told_alike_in_tiny_chunks(case, write, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 1)
    test_file_that_stops_the_run(case, write)
