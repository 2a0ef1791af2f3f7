"""What was judged is what is trained: ms-swift's own loading in one process, from files to batches, without a model.

Every row's fate is known from how it was made, not from the code under test.
"""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

from megatron_bvpo.errors import UserError  # noqa: E402
from megatron_bvpo.host.patches import apply_patches  # noqa: E402
from tests.unit.data_runs import DataOnly, load, tiny_template  # noqa: E402

MAX_LENGTH = 64
LONG = "hm " * 100


@pytest.fixture(scope="module")
def template(workshop):
    apply_patches()
    return tiny_template(workshop.moe, MAX_LENGTH)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))


# --- rows whose fate is known ---


def think(trace, answer):
    return f"<think>\n{trace}\n</think>\n\n{answer}"


def ask(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@dataclass(frozen=True)
class Fate:
    """What becomes of a row: which pairs are trained, or why it is lost."""

    trace: bool = True
    empty: bool = True
    reason: str = ""
    too_long: bool = False
    alone: bool = False  # it came without a trace pair


GOOD, BAD = think("a", "4"), think("b", "5")
BOTH, TRACE_ONLY = Fate(), Fate(empty=False)
TOO_LONG = Fate(False, False, too_long=True)


def lost(reason):
    return Fate(False, False, reason)


# kind: (makes a row of a prompt, its fate)
KINDS = {
    "plain": (lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD}, BOTH),
    "own answers": (
        lambda q: {
            "messages": ask(q, GOOD),
            "rejected_response": BAD,
            "empty_response": "2024-01-01",
            "empty_rejected_response": "2024-01-02",
        },
        BOTH,
    ),
    "rejected conversation": (lambda q: {"messages": ask(q, GOOD), "rejected_messages": ask(q, BAD)}, BOTH),
    "rejected list": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": [{"from": "gpt", "value": BAD}]},
        BOTH,
    ),
    "two conversations": (lambda q: {"chosen": ask(q, GOOD), "rejected": ask(q, BAD)}, BOTH),
    "query": (lambda q: {"query": q, "response": GOOD, "rejected_response": BAD}, BOTH),
    "sides": (lambda q: {"prompt": q, "chosen": GOOD, "rejected": BAD}, BOTH),
    "loss switches": (
        lambda q: {
            "messages": [ask(q, "")[0], {"role": "assistant", "content": GOOD, "loss": True}],
            "rejected_messages": ask(q, BAD),
        },
        BOTH,
    ),
    "odd columns": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD, "margin": "N/A", "images": "", "id": q},
        BOTH,
    ),
    "other types of odd columns": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD, "margin": 0.3, "id": 7},
        BOTH,
    ),
    "one own answer": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": BAD, "empty_response": "4"},
        Fate(empty=False, reason="empty_rejected_response: missing, the other empty answer is there"),
    ),
    "long own answer": (
        lambda q: {
            "messages": ask(q, GOOD),
            "rejected_response": BAD,
            "empty_response": LONG,
            "empty_rejected_response": "5",
        },
        Fate(empty=False, too_long=True),
    ),
    "long trace": (
        lambda q: {"messages": ask(q, think(LONG, "4")), "rejected_response": BAD},
        Fate(trace=False, too_long=True),
    ),
    "empty pair alone": (
        lambda q: {"messages": ask(q, "")[:1], "empty_response": "4", "empty_rejected_response": "5"},
        Fate(trace=False, alone=True),
    ),
    "query and empty pair": (
        lambda q: {"query": q, "empty_response": "4", "empty_rejected_response": "5"},
        Fate(trace=False, alone=True),
    ),
    "long empty pair alone": (
        lambda q: {"messages": ask(q, "")[:1], "empty_response": LONG, "empty_rejected_response": "5"},
        TOO_LONG,
    ),
    "half an empty pair alone": (
        lambda q: {"messages": ask(q, "")[:1], "empty_response": "4"},
        lost("empty_rejected_response: missing, the other empty answer is there"),
    ),
    "long prompt": (lambda q: {"messages": ask(q + LONG, GOOD), "rejected_response": BAD}, TOO_LONG),
    "no rejected side": (lambda q: {"messages": ask(q, GOOD)}, lost("rejected_response: missing")),
    "equal": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": GOOD},
        lost("rejected_response: the same text as the chosen response"),
    ),
    "no trace": (
        lambda q: {"messages": ask(q, GOOD), "rejected_response": "5"},
        lost("rejected_response: no trace, neither <think> nor </think>"),
    ),
    "unknown columns": (lambda q: {"good": GOOD, "note": q}, lost("columns: no messages and no pair of responses")),
    "another prompt": (
        lambda q: {"messages": ask(q, GOOD), "rejected_messages": ask("else", BAD)},
        lost("rejected_messages: another prompt than in messages"),
    ),
}


@dataclass
class Rows:
    """Rows with their fates, by prompt."""

    rows: list[dict] = field(default_factory=list)
    fates: dict[str, Fate] = field(default_factory=dict)

    def __init__(self, kinds):
        self.rows, self.fates = [], {}
        for i, kind in enumerate(kinds):
            make, fate = KINDS[kind]
            self.rows.append(make(f"q{i}"))
            self.fates[f"q{i}"] = fate

    def count(self, stream):
        return sum(getattr(fate, stream) for fate in self.fates.values())

    @property
    def trained(self):
        return {prompt for prompt, fate in self.fates.items() if fate.trace or fate.empty}

    @property
    def alone(self):
        return sum(fate.alone for fate in self.fates.values())

    @property
    def dropped(self):
        """Rows that are lost to the row checks, by reason."""
        return Counter(fate.reason for fate in self.fates.values() if fate.reason and not (fate.trace or fate.empty))

    @property
    def too_long(self):
        return sum(fate.too_long and not (fate.trace or fate.empty) for fate in self.fates.values())

    def too_long_alone(self, stream):
        """Rows that lose this stream's pair to their length and keep the other one."""
        return sum(
            fate.too_long and (fate.trace or fate.empty) and not getattr(fate, stream) for fate in self.fates.values()
        )


# --- files ---


def as_text(value):
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def write_csv(path, rows):
    columns = sorted({name for row in rows for name in row})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([as_text(row.get(name)) for name in columns] for row in rows)


def write_parquet(path, rows):
    """Lists of messages as such, all else as text: a column of a table has one type."""
    lists = ("messages", "rejected_messages", "chosen")
    rows = [
        {k: v if k in lists and isinstance(v, list) else None if v is None else as_text(v) for k, v in row.items()}
        for row in rows
    ]
    columns = sorted({name for row in rows for name in row})
    for row in rows:
        if isinstance(row.get("chosen"), str):
            row["chosen_response"], row["rejected_response"] = row.pop("chosen"), row.pop("rejected")
    columns = sorted({name for row in rows for name in row})
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    parquet.write_table(table, path)


WRITERS = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": write_csv,
    "parquet": write_parquet,
}


def write(folder, ending, rows):
    """One file, several, or a folder of two: the `--dataset` entries."""
    if ending == "folder":
        (folder / "data").mkdir()
        half = len(rows) // 2 or 1
        for name, part in (("train-1.jsonl", rows[:half]), ("train-2.jsonl", rows[half:])):
            if part:
                WRITERS["jsonl"](folder / "data" / name, part)
        return [str(folder / "data")]
    if ending == "files":
        entries = []
        for i, ending in enumerate(("jsonl", "parquet", "csv")):
            if part := rows[i::3]:
                WRITERS[ending](folder / f"{i}.{ending}", part)
                entries.append(str(folder / f"{i}.{ending}"))
        return entries
    WRITERS[ending](folder / f"rows.{ending}", rows)
    return [str(folder / f"rows.{ending}")]


MODES = {
    "ahead": {},
    "stream": {"streaming": True},
    "lazy": {"lazy_tokenize": True},
    "packing": {"packing": True, "packing_length": 4 * MAX_LENGTH},
}


def run(template, entries, mode="ahead", **more):
    template.packing = template.padding_free = False
    return load(DataOnly(dataset=entries, max_length=MAX_LENGTH, **MODES[mode], **more), template)


def assert_accounted(rows: Rows, loaded, mode):
    """Read = trained + named losses, for rows and for each stream's pairs."""
    read, kept = map(
        sum, zip(*loaded.numbers(r"^(?!training data)(?:\S+: )?(\d+) rows? read, (\d+) kept"), strict=True)
    )
    assert read == len(rows.rows)
    # A row of a CSV file cannot leave a cell out: what is missing there is blank.
    dropped: Counter[str] = Counter()
    for reason, number in loaded.lost("dropped").items():
        missing = "empty_rejected_response: missing, the other empty answer is there"
        reason = reason.replace("empty_rejected_response: blank", missing).replace("blank response", "missing")
        dropped[reason] += number
    assert dropped == rows.dropped and kept == read - rows.dropped.total()
    if mode == "lazy":  # a row that is too long is replaced by another while training, and counted
        assert set(loaded.rows) <= rows.trained and len(loaded.rows) == kept
        assert loaded.counts.unused.total() >= rows.too_long
        return
    assert sorted(loaded.rows) == sorted(rows.trained)
    for stream in ("trace", "empty"):
        assert loaded.pairs.get(stream, 0) == rows.count(stream), stream
    if mode == "stream":
        assert loaded.counts.unused.total() == rows.too_long
        assert loaded.counts.used + rows.too_long == kept
        for stream in ("trace", "empty"):
            named = {why: n for (lost_by, why), n in loaded.counts.lost.items() if lost_by == stream}
            never = rows.alone if stream == "trace" else 0
            assert sum(named.values()) == loaded.counts.used - rows.count(stream) - never
            assert sum(n for why, n in named.items() if "longer" in why) == rows.too_long_alone(stream)
    else:
        assert sum(n for (n,) in loaded.numbers(r"(\d+) rows dropped: longer")) == rows.too_long
        for stream in ("trace", "empty"):
            alone = loaded.numbers(rf"(\d+) rows kept without the {stream} pair: longer")
            assert sum(n for (n,) in alone) == rows.too_long_alone(stream)


ANY_KINDS = st.lists(st.sampled_from(sorted(KINDS)), max_size=9)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # cases are small already
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kinds=ANY_KINDS,
    ending=st.sampled_from(["jsonl", "json", "csv", "parquet", "folder"]),
    mode=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 99),
)
def test_read_is_trained_and_named_losses(kinds, ending, mode, seed, template, tmp_path_factory):
    kinds = ["plain", "plain", *kinds]  # something must be left, in each half of a folder too
    order = random.Random(seed)
    order.shuffle(kinds)
    rows = Rows(kinds)
    if ending == "folder":
        half = len(kinds) // 2
        if not any(rows.fates[f"q{i}"].trace for i in range(half)):
            return
        if not any(rows.fates[f"q{i}"].trace for i in range(half, len(kinds))):
            return
    entries = write(tmp_path_factory.mktemp("rows"), ending, rows.rows)
    assert_accounted(rows, run(template, entries, mode), mode)


@pytest.mark.parametrize("mode", MODES)
def test_several_files(template, tmp_path, mode):
    rows = Rows([kind for kind in KINDS for _ in range(3)])
    assert_accounted(rows, run(template, write(tmp_path, "files", rows.rows), mode), mode)


# --- columns and their types ---


def trained_texts(template, dataset):
    """The responses of every sequence that a data stage encodes, in order of the rows."""
    found = []
    for i in range(len(dataset)):
        row = dataset[i]
        names = [f"{stream}{side}" for stream in ("", "empty_") for side in ("chosen", "rejected")]
        ids = {name: row[f"{name}_input_ids"] for name in names if f"{name}_input_ids" in row}
        texts = {name: template.tokenizer.decode(given) for name, given in ids.items()}
        found.append({name: text.split("assistant\n")[-1].split("<|im_end|>")[0] for name, text in texts.items()})
    return found


LATE = {
    "an own empty answer": {"empty_response": "four", "empty_rejected_response": "five"},
    "a key inside a message": {"messages": [*ask("late", GOOD)[:1], {**ask("late", GOOD)[1], "loss": True}]},
    "text where numbers were": {"id": "b"},
    "another type of margin": {"margin": 0.3},
    "a rejected conversation": {"rejected_response": None, "rejected_messages": ask("q", BAD)},
}


@pytest.mark.parametrize(("ending", "late"), [*(("jsonl", late) for late in LATE), ("json", "a rejected conversation")])
def test_columns_that_come_after_the_first_ten_megabytes(late, ending, template, tmp_path):
    """datasets takes the columns of a file from its first 10 MB, and ms-swift's passes theirs from 1000 rows."""
    base = {"messages": ask("q", GOOD), "rejected_response": BAD, "id": 7, "margin": "0.3", "note": "x" * 11_000}
    rows = [*[base] * 1010, *[{**base, **LATE[late]}] * 4]
    [entry] = write(tmp_path, ending, rows)
    assert (tmp_path / f"rows.{ending}").stat().st_size > 11_000_000
    loaded = run(template, [entry])
    assert len(loaded.rows) == len(rows) and loaded.pairs == {"trace": len(rows), "empty": len(rows)}


def test_a_long_row_after_a_thousand_short_ones_is_counted(template, tmp_path):
    rows = Rows(["plain"] * 1005 + ["long trace", "long own answer"])
    assert_accounted(rows, run(template, write(tmp_path, "jsonl", rows.rows)), "ahead")


ANSWERS = {
    "dates": ("2024-01-01", "2024-01-02"),
    "times": ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"),
    "numbers": ("4", "5"),
    "truth": ("true", "false"),
    "floats": ("1e3", "007"),
    "null in words": ("null", "NaN"),
    "lists": ("[1]", "{}"),
}


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "folder"])
def test_a_text_stays_a_text(answers, ending, template, tmp_path):
    own = dict(zip(("empty_response", "empty_rejected_response"), ANSWERS[answers], strict=True))
    rows = [{"messages": ask(f"q{i}", GOOD), "rejected_response": BAD, **own} for i in range(3)]
    entries = write(tmp_path, ending, rows)
    from tests.unit.data_runs import DataStage, TemplateSettings, make_bvpo_template, pipeline

    args = DataOnly(dataset=entries, max_length=MAX_LENGTH)
    make_bvpo_template(template, TemplateSettings(pipeline.RowRules(), "<think>\n\n</think>\n\n"))
    template.packing = template.padding_free = False
    train, _ = DataStage(args, template)._prepare_dataset()
    for texts in trained_texts(template, train):
        assert [texts[f"empty_{side}"].split("</think>\n\n")[-1] for side in ("chosen", "rejected")] == [
            *ANSWERS[answers]
        ]


# --- other sources ---


@pytest.mark.parametrize("mode", ["ahead", "stream"])
def test_a_sample_of_a_file_is_of_its_usable_rows(template, tmp_path, mode):
    rows = Rows(["no trace", "plain", "equal", "plain", "plain", "query", "no rejected side"])
    [entry] = write(tmp_path, "jsonl", rows.rows)
    loaded = run(template, [f"{entry}#3"], mode)
    assert len(set(loaded.rows)) == 3 and set(loaded.rows) <= rows.trained


def test_a_file_for_training_and_evaluation(template, tmp_path):
    rows = Rows(["plain"] * 6 + ["no trace"])
    entries = write(tmp_path, "jsonl", rows.rows)
    loaded = run(template, entries, val_dataset=entries, output_dir=str(tmp_path))
    assert sorted(loaded.rows) == sorted(rows.trained)
    assert loaded.numbers(r"held-out data: (\d+) rows read, (\d+) kept") == [(6, 6)]


@pytest.mark.parametrize("mode", ["ahead", "stream", "lazy"])
def test_a_data_set_of_the_hub(template, tmp_path, mode, monkeypatch):
    """Rows that come typed and padded by datasets, and are judged after loading."""
    from swift.dataset import loader

    kinds = [kind for kind in KINDS if kind not in ("rejected list", "other types of odd columns", "sides")]
    rows = Rows([*kinds, *kinds])
    columns = sorted({name for row in rows.rows for name in row})
    plain = [{name: row.get(name) or None for name in columns} for row in rows.rows]
    monkeypatch.setattr(loader, "get_hub", lambda use_hf: HubOf(plain))
    loaded = run(template, ["someone/pairs"], mode)
    kept = len(rows.rows) - rows.dropped.total()
    if mode == "stream":  # bad rows are met while training
        unused = Counter(loaded.counts.unused)
        assert unused.pop(f"longer than --max_length {MAX_LENGTH}") == rows.too_long and unused == rows.dropped
        lost = 2 * len(rows.trained) - rows.count("trace") - rows.count("empty") - rows.alone
        assert sum(loaded.counts.lost.values()) == lost
    else:
        assert loaded.numbers(r"training data: (\d+) rows read, (\d+) kept") == [(len(rows.rows), kept)]
        assert loaded.lost("dropped") == rows.dropped
        assert any(line.startswith("training data: row ") for line in loaded.log), "no row is named"
    if mode != "lazy":
        assert sorted(loaded.rows) == sorted(rows.trained)
        assert loaded.pairs == {stream: rows.count(stream) for stream in ("trace", "empty")}


class HubOf:
    """A hub with one data set."""

    def __init__(self, rows):
        self.rows = rows

    def load_dataset(self, name, subset, split, streaming=False, **_):
        from datasets import Dataset

        found = Dataset.from_list(self.rows)
        return found.to_iterable_dataset() if streaming else found


@pytest.mark.parametrize("mode", ["ahead", "stream"])
@pytest.mark.parametrize("source", ["hub", "file"])
def test_a_column_that_is_mapped_to_gives_way(template, tmp_path, mode, source, monkeypatch):
    """datasets: KeyError, or two columns of one name."""
    from swift.dataset import loader

    rows = [{"messages": ask(f"q{i}", GOOD), "rejected_response": "none of it", "worse": BAD} for i in range(3)]
    monkeypatch.setattr(loader, "get_hub", lambda use_hf: HubOf(rows))
    entries = ["someone/pairs"] if source == "hub" else write(tmp_path, "jsonl", rows)
    loaded = run(template, entries, mode, columns='{"worse": "rejected_response"}')
    assert loaded.pairs == {"trace": 3, "empty": 3}


@pytest.mark.parametrize("mode", ["ahead", "stream"])
def test_a_registered_data_set_with_its_own_preprocessor(template, tmp_path, mode):
    from swift.dataset import DatasetMeta, RowPreprocessor, register_dataset

    class Mine(RowPreprocessor):
        def preprocess(self, row):
            if row["score"] < 0:
                return None
            return {"messages": ask(row["q"], row["texts"][0]), "rejected_response": row["texts"][1]}

    file = tmp_path / f"mine-{mode}.jsonl"
    good = [{"q": f"q{i}", "texts": [GOOD, BAD], "score": i} for i in range(3)]
    bad = [{"q": "x", "texts": [GOOD], "score": 1}, {"q": "y", "texts": [GOOD, BAD], "score": -1}]
    equal = [{"q": "z", "texts": [GOOD, GOOD], "score": 1}]
    WRITERS["jsonl"](file, [*bad, *good, *equal])
    register_dataset(DatasetMeta(dataset_path=str(file), preprocess_func=Mine()))
    loaded = run(template, [str(file)], mode)
    assert sorted(loaded.rows) == ["q0", "q1", "q2"] and loaded.pairs["trace"] == 3
    reasons = {
        "row: ms-swift's preprocessor cannot read it": 1,
        "row: left out by the data set's own preprocessor": 1,
        "rejected_response: the same text as the chosen response": 1,
    }
    assert (loaded.counts.unused if mode == "stream" else loaded.lost("dropped")) == reasons
    if mode == "ahead":
        told = [line for line in loaded.log if "IndexError list index out of range" in line]
        assert told and told[0].startswith("training data: row 1: row: ms-swift's preprocessor cannot read it")


@pytest.mark.parametrize("with_file", [False, True])
def test_a_data_set_that_ms_swift_has_cached(template, tmp_path, with_file):
    """`swift export --to_cached_dataset` keeps rows and lengths; it knows nothing of the empty pair."""
    from datasets import Dataset

    kinds = [kind for kind in ("plain", "own answers", "long trace", "no trace", "long own answer") for _ in range(2)]
    rows = Rows(kinds)
    lengths = [[9, 9] if "long trace" != kind else [300, 9] for kind in kinds]
    cached = Dataset.from_list([{**row, "lengths": length} for row, length in zip(rows.rows, lengths, strict=True)])
    cached.save_to_disk(str(tmp_path / "cached"))
    more = {}
    if with_file:
        WRITERS["jsonl"](tmp_path / "more.jsonl", [{"messages": ask("more", GOOD), "rejected_response": BAD}])
        more = {"dataset": [str(tmp_path / "more.jsonl")]}
    template.packing = template.padding_free = False
    loaded = load(DataOnly(cached_dataset=[str(tmp_path / "cached")], max_length=MAX_LENGTH, **more), template)
    assert sorted(loaded.rows) == sorted([*rows.trained, *(["more"] if with_file else [])])
    assert loaded.lost("dropped") == rows.dropped
    assert loaded.numbers(r"(\d+) rows kept without the trace pair: longer") == [(rows.too_long_alone("trace"),)]


def test_a_folder_with_a_file_of_no_use_names_it(template, tmp_path):
    rows = Rows(["no trace", "plain"])
    with pytest.raises(UserError, match="train-1.jsonl.*no row is left"):
        run(template, write(tmp_path, "folder", rows.rows))


def test_several_processes(template, tmp_path, monkeypatch):
    """`--dataset_num_proc 2`, over rows that are judged ahead and over rows that are judged after loading."""
    from swift.dataset import loader

    rows = Rows(["plain", "no trace", "long trace", "own answers", "plain"])
    columns = sorted({name for row in rows.rows for name in row})
    found = [{name: row.get(name) for name in columns} for row in rows.rows]
    monkeypatch.setattr(loader, "get_hub", lambda use_hf: HubOf(found))
    entries = [*write(tmp_path, "jsonl", rows.rows), "someone/pairs"]
    loaded = run(template, entries, dataset_num_proc=2)
    assert sorted(loaded.rows) == sorted([*rows.trained] * 2)
    assert loaded.numbers(r"(\d+) rows kept without the trace pair: longer") == [(2,)]


@pytest.mark.parametrize("columns", [None, '{"worse": "rejected_response"}'])
def test_the_ranks_read_no_file_that_the_launching_process_has_read(template, tmp_path, monkeypatch, columns):
    from megatron_bvpo.data import handover
    from megatron_bvpo.launching.start_checks import scan_data
    from tests.unit.data_runs import pipeline

    rows = [{"messages": ask(f"q{i}", GOOD), "worse" if columns else "rejected_response": BAD} for i in range(3)]
    [entry] = write(tmp_path, "jsonl", rows)
    given = ["--columns", columns] if columns else []
    lines = scan_data(["--dataset", f"{entry}#2", "--bvpo_alpha", "auto", *given])
    monkeypatch.setattr(pipeline, "handed_over_scan", lambda: lines)
    monkeypatch.setattr(handover, "read_rows", None)
    assert len(run(template, [f"{entry}#2"], columns=columns).rows) == 2
