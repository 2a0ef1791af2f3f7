"""The Arrow file between a data file and datasets: when it is written, when it is used, and what stands in it."""

import json
import os
from pathlib import Path
from threading import Timer

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_bvpo.data import handover, shared_cache
from megatron_bvpo.data.handover import COLUMNS, Reading, handed_over
from megatron_bvpo.data.rows import RowRules
from megatron_bvpo.errors import UserError
from tests.unit.sample_rows import OWN, REJECTED, RULES, row, talk

READING = Reading(RULES)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets" / "bvpo"


@pytest.fixture
def pairs(tmp_path, cache):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in (row(), row(rejected="x"), row(**OWN))))
    return file


def rows_of(arrow):
    with pa.memory_map(arrow) as source:
        table = pa.ipc.open_stream(source).read_all()
    return table.to_pylist()


def test_kept_rows_and_the_counts_of_all(pairs, cache):
    arrow, report = handed_over(str(pairs), READING)
    rows = rows_of(arrow)
    assert Path(arrow).parent == cache and tuple(rows[0]) == COLUMNS
    assert [entry["bvpo_source"] for entry in rows] == [f"{pairs}:1", f"{pairs}:3"]
    assert [json.loads(message) for message in rows[0]["messages"]] == talk()
    assert rows[0]["rejected_response"] == REJECTED and rows[0]["empty_response"] is None
    assert rows[1]["empty_response"] == OWN["empty_response"]
    assert (report.tally.rows, report.tally.kept) == (3, 2) and report.listed[0].startswith(f"{pairs}:2: ")


def test_a_second_start_reads_nothing_unless_it_is_asked_to(pairs, cache, monkeypatch):
    arrow, report = handed_over(str(pairs), READING)
    before = os.stat(arrow)
    read = []
    stock = handover.read_rows
    monkeypatch.setattr(handover, "read_rows", lambda path: read.append(path) or stock(path))
    again, counts = handed_over(str(pairs), READING)
    assert (again, counts) == (arrow, report) and not read
    handed_over(str(pairs), READING, fresh=True)
    assert read == [str(pairs)]
    after = os.stat(arrow)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "what depends on it stays good"
    assert [file.name for file in cache.iterdir()] == [Path(arrow).name]


def test_whatever_has_a_say_in_the_rows_gets_a_file_of_its_own(pairs):
    readings = [
        READING,
        Reading(RowRules(empty="require")),
        Reading(RowRules(streams=("trace",))),
        Reading(RULES, {"a": "messages"}),
        Reading(RULES, auto_mapping=False),
    ]
    found = {handed_over(str(pairs), reading)[0] for reading in readings}
    with pairs.open("a") as file:
        file.write(json.dumps(row()) + "\n")
    found.add(handed_over(str(pairs), READING)[0])
    assert len(found) == 6


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:300], lambda raw: b"", lambda raw: b"x" * 50, lambda raw: raw[:-30]]
)
def test_a_damaged_file_is_written_again(damage, pairs):
    arrow, report = handed_over(str(pairs), READING)
    whole = Path(arrow).read_bytes()
    Path(arrow).write_bytes(damage(whole))
    assert handed_over(str(pairs), READING) == (arrow, report)
    assert Path(arrow).read_bytes() == whole


def test_a_file_that_grows_while_it_is_read(pairs, cache, monkeypatch):
    stock = handover.read_rows

    def growing(path):
        yield from stock(path)
        with pairs.open("a") as file:
            file.write(json.dumps(row()) + "\n")

    monkeypatch.setattr(handover, "read_rows", growing)
    with pytest.raises(UserError, match="changed while it was read"):
        handed_over(str(pairs), READING)
    assert not list(cache.iterdir())


def test_an_error_leaves_nothing_behind(pairs, cache):
    with pairs.open("a") as file:
        file.write("[1]\n")
    with pytest.raises(UserError, match="expected an object"):
        handed_over(str(pairs), READING)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(pairs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written: Not a directory") as caught:
        handed_over(str(pairs), READING)
    assert "MODELSCOPE_CACHE" in caught.value.remedy


def as_stream(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def as_file(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TABLES = {
    "parquet": ("a.parquet", lambda path, table: parquet.write_table(table, path, row_group_size=2)),
    "arrow stream": ("a.arrow", as_stream),
    "arrow file": ("a.arrow", as_file),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind, cache, tmp_path):
    name, write = TABLES[kind]
    entries = [{"messages": talk(), "rejected_response": REJECTED, **own} for own in ({}, OWN, {}, OWN, {})]
    columns = ("messages", "rejected_response", *OWN)
    write(tmp_path / name, pa.table({column: [entry.get(column) for entry in entries] for column in columns}))
    arrow, report = handed_over(str(tmp_path / name), READING)
    assert (report.tally.rows, report.tally.own, report.tally.stripped) == (5, 2, 3)
    assert rows_of(arrow)[3]["bvpo_source"] == f"{tmp_path / name}:4"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1 or not", b"x" * 5000])
def test_what_is_no_table(name, content, cache, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        handed_over(str(tmp_path / name), READING)
    assert caught.value.file == str(tmp_path / name) and caught.value.remedy


def test_the_columns_are_those_that_datasets_is_told(pairs):
    from datasets import Dataset

    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    import swift.megatron.pipelines.train.rlhf  # noqa: F401  before the other modules of swift.megatron

    from megatron_bvpo.data.loading import FEATURES

    dataset = Dataset.from_file(handed_over(str(pairs), READING)[0])
    assert dataset.features == FEATURES and dataset[0]["messages"] == talk()


def test_a_named_folder_takes_the_rows(pairs, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("BVPO_DATA_CACHE", str(tmp_path / "shared"))
    assert Path(handed_over(str(pairs), READING)[0]).parent == tmp_path / "shared" and not cache.exists()


def test_a_disk_without_room_is_told_before_it_is_full(pairs, cache, monkeypatch):
    full = type("Usage", (), {"free": pairs.stat().st_size})
    monkeypatch.setattr(shared_cache.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(UserError, match="GiB are free, and what is made of .* takes about") as caught:
        handed_over(str(pairs), READING)
    assert "BVPO_DATA_CACHE" in caught.value.remedy and not cache.exists()


def test_files_that_show_up_late(tmp_path):
    """As NFS shows them."""
    late = tmp_path / "late.arrow"
    assert not shared_cache.all_visible([str(late)], 0.0)
    Timer(0.7, late.touch).start()
    assert shared_cache.all_visible([str(late)], 30.0)


def test_spare_cores(monkeypatch):
    monkeypatch.setattr(shared_cache.os, "sched_getaffinity", lambda pid: set(range(24)))
    for ranks, wanted in (("1", 24), ("8", 17), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert shared_cache.spare_cores() == wanted
    monkeypatch.setattr(shared_cache.os, "sched_getaffinity", lambda pid: set(range(192)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert shared_cache.spare_cores() == shared_cache.MOST_PROCESSES
