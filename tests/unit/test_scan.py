"""Data files before loading: what is read, what is counted, and what people are told about it."""

import csv
import io
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bvpo.data import readers
from megatron_bvpo.data.aliases import canonical_row
from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.rows import check_row
from megatron_bvpo.data.scan import local_file, scan_files
from megatron_bvpo.errors import UserError
from tests.unit.sample_rows import CHOSEN, READING, REJECTED, RULES, jsonl, row, talk

pytestmark = pytest.mark.usefixtures("row_cache")


GOOD = jsonl(row())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_report_for_a_person(write):
    path = write(jsonl(row(), row(rejected="<think>cut"), row(empty_response="4")))
    report = scan_files([path, "org/data:sub#10", "hf::org/data"], READING)
    lines = report.lines()
    assert lines[0] == f"{path}: 3 rows"
    assert lines[1] == "3 rows read, 2 kept."
    problem = "no </think> (generation was cut off; raise the generation limit, or leave the row out)"
    assert f"{path}:2: rejected_response: {problem}" in lines
    assert lines[-2:] == [
        "org/data:sub#10: not a local file; its rows are checked after loading.",
        "hf::org/data: not a local file; its rows are checked after loading.",
    ]


def test_listing_is_limited_and_counts_are_not(write):
    path = write(jsonl(row(), *[row(chosen="x")] * 5))
    report = scan_files([path], READING, max_listed=2)
    assert len(report.listed) == 2 and report.not_listed == 3 and report.tally.dropped.total() == 5
    assert "… and 3 more problems." in report.lines()


def test_entries_that_are_left_to_ms_swift(tmp_path, write):
    entries = [str(tmp_path), write(b"x", "a.txt"), "org/data", "ms::org/data#5"]
    report = scan_files(entries, READING)
    assert len(report.skipped) == 4 and not report.files and report.tally.rows == 0


def test_sampled_and_subset_entries_are_local_files(write):
    path = write(GOOD)
    assert local_file(f"{path}#5") == (path, "")
    assert local_file(f"{path}:sub") == (path, "")
    odd = write(GOOD, "a#b::c.jsonl")
    assert local_file(odd) == (odd, ""), "a name that exists is taken as it is"


# Characters that str.splitlines takes for ends of lines, none of which ends one here.
ODD_LINE = json.dumps(row("a\u2028b\x85c\x0bd</think>é"), ensure_ascii=False).encode()

LAYOUTS = {
    "lines": ("a.jsonl", GOOD * 3, [1, 2, 3]),
    "no end of line": ("a.jsonl", (GOOD * 3).rstrip(), [1, 2, 3]),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD * 2, [1, 2]),
    "CRLF and blank lines": ("a.jsonl", b"\r\n" + GOOD.replace(b"\n", b"\r\n\r\n") * 2, [2, 4]),
    "a list": ("a.json", b"\n[" + GOOD + b",\n\n" + GOOD + b"]\n", [2, 5]),
    "a list in one line": ("a.jsonl", json.dumps([row(), row()]).encode(), [1, 1]),
    "lines in a .json file": ("a.json", GOOD * 2, [1, 2]),
    "byte order mark before a list": ("a.json", b"\xef\xbb\xbf[" + GOOD + b"]", [1]),
    "rows in an object": ("a.json", b'{"data": [\n' + GOOD + b",\n" + GOOD + b"]}", [2, 4]),
    "rows in an object with more": (
        "a.json",
        b' {\n"rows" : [' + GOOD + b'], "version": {"a": [1]}, "by": "x"}\n',
        [2],
    ),
    "unicode line ends": ("a.jsonl", ODD_LINE + b"\n" + GOOD, [1, 2]),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_their_lines(layout, chunk, write, monkeypatch):
    # Tiny chunks cut rows, numbers and characters in every place.
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    name, content, lines = LAYOUTS[layout]
    rows = list(readers.read_rows(write(content, name)))
    assert [line for line, _ in rows] == lines
    assert all(check_row(entry, RULES).kept for _, entry in rows)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_list_is_read_as_json_reads_it(write, entries):
    entries = json.loads(json.dumps(entries).replace("NaN", "0"))
    for indent in (None, 2):
        path = write(json.dumps(entries, indent=indent, ensure_ascii=False).encode("utf-8", "replace"), "a.json")
        assert [entry for _, entry in readers.read_rows(path)] == entries


def test_a_very_long_line(write):
    long = row(chosen="<think>\n" + "so 2+2 is 4. " * 400_000 + "</think>4")
    path = write(jsonl(row(), long, row(rejected="x")))
    report = scan_files([path], READING)
    assert report.tally.kept == 2 and report.listed[0].startswith(f"{path}:3: rejected_response: no trace")


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.csv"])
def test_memory_does_not_grow_with_the_file(name, write):
    count, text = 4000, "x" * 5000
    if name == "big.csv":
        content = b"query,response,rejected_response\n"
        content += f"q,<think>{text}</think>4,<think>b</think>5\n".encode() * count
    else:
        rows = [json.dumps(row(chosen=f"<think>{text}</think>4"))] * count
        content = "\n".join(rows).encode() if name == "big.jsonl" else f"[{','.join(rows)}]".encode()
    path, size = write(content, name), len(content)
    assert size > 20_000_000
    tracemalloc.start()
    report = scan_files([path], READING)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.tally.kept == count
    assert peak < 8_000_000


def csv_bytes(header, *rows):
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    return out.getvalue().encode()


def test_csv(write):
    header = ["messages", "rejected_response", "empty_response", "empty_rejected_response"]
    rows = [
        [json.dumps(talk()), REJECTED, "4", "five, or 6"],
        [str(talk()), REJECTED, "4", "5"],
        [json.dumps(talk("x" * 200_000 + "</think>4")), 'or "so"</think>5', "4", "4"],
        [json.dumps(talk()), "no\ntags", "4", "5 "],
    ]
    path = write(b"\xef\xbb\xbf" + csv_bytes(header, *rows, [*rows[0][:2], "", ""]), "a.csv")
    report = scan_files([path], READING)
    assert csv.field_size_limit() == 131_072, "the limit is raised for the scan only"
    assert (report.tally.rows, report.tally.trace_pairs, report.tally.own) == (5, 4, 2)
    # Rows 1 and 3 hold line breaks; the fourth row starts after them.
    start = 2 + sum(len(entry[1].splitlines()) for entry in rows[:3])
    assert any(text.startswith(f"{path}:{start}: rejected_response: no trace") for text in report.listed)


ALIASES = {
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": CHOSEN}]},
    "sharegpt": {"conversation": [{"human": "q", "assistant": CHOSEN}]},
    "text": {"messages": json.dumps([{"role": "user", "content": "q"}, *talk()[1:]])},
    "query": {"query": "q", "response": CHOSEN},
    "capitals": {"Question": "q", "Output": CHOSEN},
    "list of responses": {"prompt": "q", "answer": [CHOSEN, "other"]},
    "response wins over answer": {"query": "q", "response": CHOSEN, "answer": "4"},
    "alpaca": {"instruction": "q", "input": "", "output": CHOSEN},
}


@pytest.mark.parametrize("name", ALIASES)
def test_other_spellings_are_read_as_ms_swift_reads_them(name, write):
    entry = {**ALIASES[name], "rejected_response": REJECTED}
    standard = canonical_row(entry)
    assert standard["messages"] == [{"role": "user", "content": "q"}, talk()[1]]
    report = scan_files([write(jsonl(entry))], READING)
    assert report.tally.kept == 1


def test_system_and_history():
    entry = {"query": "q", "response": CHOSEN, "rejected_response": REJECTED}
    full = canonical_row({**entry, "system": "s", "history": "[['a', 'b']]"})
    assert [m["content"] for m in full["messages"]] == ["s", "a", "b", "q", CHOSEN]
    both = canonical_row({"messages": talk(), "rejected_messages": talk(REJECTED), "system": "s"})
    assert both["messages"][0] == {"role": "system", "content": "s"}
    # ms-swift gives the system column to the chosen side alone; the two prompts would differ.
    assert both["rejected_messages"][0] == both["messages"][0] and check_row(both, RULES).kept


def test_columns_of_the_user(write):
    path = write(jsonl({"dialogue": talk(), "worse": REJECTED}))
    columns = {"dialogue": "messages", "worse": "rejected_response"}
    assert scan_files([path], Reading(RULES, columns)).tally.kept == 1
    told = """--columns '{"dialogue": "messages", "worse": "rejected_response"}'."""
    with pytest.raises(UserError, match="found dialogue, worse") as caught:
        scan_files([path], READING)
    assert caught.value.remedy.endswith(told)
    named = write(jsonl({"conversations": talk(), "rejected_response": REJECTED}), "b.jsonl")
    assert scan_files([named], READING).tally.kept == 1
    with pytest.raises(UserError, match="no row is left"):
        scan_files([named], Reading(RULES, auto_mapping=False))
