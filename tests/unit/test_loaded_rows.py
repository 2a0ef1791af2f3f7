"""What was judged is what is trained: ms-swift's own loading in one process, from files to batches, without a model.

Every row's fate is known from how it was made, not from the code under test.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

from megatron_bvpo.host.patches import apply_patches  # noqa: E402
from tests.unit.data_runs import DataOnly, tiny_template  # noqa: E402
from tests.unit.fated_rows import BAD, GOOD, KINDS, MAX_LENGTH, MODES, Rows, ask, run, write  # noqa: E402

pytestmark = pytest.mark.usefixtures("row_cache")


@pytest.fixture(scope="module")
def template(workshop):
    apply_patches()
    return tiny_template(workshop.moe, MAX_LENGTH)


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
