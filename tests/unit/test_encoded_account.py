"""What is told of rows that were encoded, ahead or while training: read is trained and lost."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset

from megatron_bvpo.data.batches import LAYOUT_KEY, ROW_KEY
from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.loading import OUR_COLUMNS, judge_dataset, length_lines
from megatron_bvpo.data.measuring import measure_dataset
from megatron_bvpo.errors import UserError
from tests.unit.encoded_rows import LONG, OTHER, TOOL, template_maker
from tests.unit.sample_rows import CHOSEN, OWN, row, talk


@pytest.fixture(scope="module")
def make(workshop):
    return template_maker(workshop)


def mixed_rows() -> list[dict]:
    behind = f"<think>\n{LONG}\n</think>\n\n"
    asked = {"role": "user", "content": f"Long? {LONG}"}
    return [
        row(),
        row(**OWN),
        row(f"<think>\nSo {LONG}</think>4", f"<think>\nOr {LONG}</think>5"),
        row(f"{behind}4", f"{behind}5"),
        row(f"{behind}4", f"{behind}5", empty_response="4", empty_rejected_response=f"5{LONG}"),
        {**row(), "messages": [asked, talk()[1]]},
        row(tools=[TOOL], rejected_tools=[OTHER], **OWN),
        row(rejected=CHOSEN.replace("4", "5")[8:], empty_response="4"),
    ]


@pytest.fixture
def columns(monkeypatch):
    """Our columns pass ms-swift's loader, as host/patches.py has it."""
    from swift.dataset import RowPreprocessor

    known = [*RowPreprocessor.standard_keys, *OUR_COLUMNS, ROW_KEY]
    monkeypatch.setattr(RowPreprocessor, "standard_keys", known)


def table(rows) -> Dataset:
    names = dict.fromkeys(name for entry in rows for name in entry)
    return Dataset.from_list([{name: entry.get(name) for name in names} for entry in rows])


def measured(template, rows):
    judged, report = judge_dataset(table(rows), Reading(template.bvpo.rules), num_proc=1, load_from_cache_file=False)
    return report.tally, *measure_dataset(judged, template, num_proc=1, load_from_cache_file=False)


# strategy: (trace pairs left, empty pairs left, rows left, a line)
ACCOUNTS = {
    "right": (4, 5, 6, "2 rows kept without the trace pair: the same tokens on both sides within --max_length 64"),
    "left": (4, 5, 6, "2 rows kept without the trace pair: no prompt within --max_length 64"),
    "raise": (3, 4, 5, "2 rows kept without the trace pair: longer than --max_length 64"),
}


@pytest.mark.parametrize("strategy", ACCOUNTS)
def test_read_is_trained_and_lost(strategy, make, columns):
    template = make(max_length=64, truncation_strategy=strategy)
    tally, dataset, found = measured(template, mixed_rows())
    layout = template.data_collator([template.encode(entry) for entry in dataset])[LAYOUT_KEY]
    for stream, judged in (("trace", tally.trace_pairs), ("empty", tally.empty_pairs)):
        assert layout.count(stream) == found.pairs[stream] == judged - found.lost[stream].total()
    assert tally.kept == len(dataset) + found.rows.total()
    trace, empty, rows, line = ACCOUNTS[strategy]
    assert (found.pairs["trace"], found.pairs["empty"], len(dataset)) == (trace, empty, rows)
    text = "\n".join(found.lines())
    assert line in text
    assert f"trace stream: {tally.trace_pairs} pairs encoded, {trace} left and" in text
    assert "1 rows dropped: the rejected response has another prompt than the chosen" in text
    assert "row 6 ('What is 2+2?'): its trace pair: the rejected response has another prompt" in text
    lengths = "\n".join(length_lines(dataset["lengths"], ("trace", "empty")))
    for stream in ("trace", "empty"):
        assert f"{stream} stream: {found.pairs[stream]} pairs" in lengths


def test_cuts_are_counted(make, columns):
    found = measured(make(max_length=64, truncation_strategy="right"), mixed_rows()[:3])[2]
    assert found.lines() == ["trace stream: 1 pairs cut to --max_length."]


def test_a_stream_without_a_pair_is_refused(make, columns):
    rows = mixed_rows()[3:4]
    found = measured(make(max_length=64, truncation_strategy="right"), rows)[2]
    with pytest.raises(UserError) as told:
        found.require_pairs(("trace", "empty"), ["a.jsonl"])
    assert (told.value.file, told.value.field) == ("a.jsonl", "--max_length")
    assert told.value.message.startswith("no trace pair is left: 1 the same tokens on both sides within --max_length")
    found.require_pairs(("empty",), [])
    found = measured(make(), mixed_rows()[6:7])[2]
    with pytest.raises(UserError, match="no row is left: 1 the rejected response has another prompt") as told:
        found.require_pairs(("trace",), [])
    assert told.value.field is None


# --- rows that are encoded while training ---


def told_by(make, caplog, **given):
    template = make(count_unused=True, **given)
    logger = logging.getLogger("swift")
    logger.setLevel(logging.ERROR)  # as ms-swift has it on all but the first rank of a node
    logger.addHandler(caplog.handler)
    return template, lambda: [record.getMessage() for record in caplog.records if record.name == "swift"]


@pytest.fixture
def quiet_again(caplog):
    yield
    logging.getLogger("swift").removeHandler(caplog.handler)
    logging.getLogger("swift").setLevel(logging.ERROR)


def test_a_lazy_run_names_what_it_passes_over(make, caplog, quiet_again, columns):
    from swift.dataset import LazyLLMDataset

    template, told = told_by(make, caplog, max_length=64, truncation_strategy="right")
    rows = [mixed_rows()[0], mixed_rows()[5]]
    lazy = LazyLLMDataset(table([{**r, ROW_KEY: i} for i, r in enumerate(rows)]), template.encode)
    assert lazy[1][ROW_KEY] == 0  # the only other row
    (line,) = told()
    assert line.startswith("row 1 ('Long? Hm. ") and "its trace pair is not trained: no response within" in line
    assert line.endswith("(1 such rows in this process so far)")


def test_a_streamed_run_passes_over_them_too(make, caplog, quiet_again, columns):
    from swift.dataset import EncodePreprocessor

    template, told = told_by(make, caplog, max_length=64, truncation_strategy="right")
    rows = [*(mixed_rows()[i] for i in (3, 0, 5, 7)), {"messages": None}]
    stream = EncodePreprocessor(template=template)(table(rows).to_iterable_dataset())
    layout = template.data_collator(list(stream))[LAYOUT_KEY]
    # The first row has no trace pair, the last no empty one: a stream fills those columns with None.
    assert (layout.count("trace"), layout.count("empty")) == (2, 2)
    assert [line.split(":")[0] for line in told()][0] == "row ? ('What is 2+2?')"
    assert len(told()) == 3 and told()[2].startswith("row ? (''): its trace pair is not trained: messages: missing")


def test_the_plan_counts_the_same_tokens(make, workshop, tmp_path):
    """`bvpo plan --rows` without ms-swift: a few of the template's own tokens a sequence apart."""
    from megatron_bvpo.data.readers import read_rows
    from megatron_bvpo.planning.row_lengths import row_lengths
    from megatron_bvpo.planning.settings import RunSettings

    template = make()
    reading = Reading(template.bvpo.rules)
    file = tmp_path / "rows.jsonl"
    alone = {"messages": talk()[:1], "empty_response": LONG, "empty_rejected_response": "5"}
    file.write_text(f"{workshop.train.read_text()}{json.dumps(alone)}\n")
    rows = [reading.canonical(entry)[0] for _, entry in read_rows(str(file))]
    lengths = [template.encode_with_account(entry, return_length=True)[0]["lengths"] for entry in rows]
    found = row_lengths(str(file), str(workshop.dense), RunSettings())
    assert found == pytest.approx([sum(row) for row in lengths], abs=4 * 8) and all(len(row) == 4 for row in lengths)
