"""Where rows may come from: samples of files, the hub, registered and cached data sets, folders, several processes."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

from megatron_bvpo.errors import UserError  # noqa: E402
from megatron_bvpo.host.patches import apply_patches  # noqa: E402
from tests.unit.data_runs import DataOnly, load, tiny_template  # noqa: E402
from tests.unit.fated_rows import BAD, GOOD, KINDS, MAX_LENGTH, WRITERS, Rows, ask, run, write  # noqa: E402

pytestmark = pytest.mark.usefixtures("row_cache")


@pytest.fixture(scope="module")
def template(workshop):
    apply_patches()
    return tiny_template(workshop.moe, MAX_LENGTH)


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
