"""What was judged is what is trained: rows through ms-swift's own templates, with a tokenizer of a tiny model."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bvpo.data.batches import LAYOUT_KEY, ROW_KEY, TemplateSettings, make_bvpo_template
from megatron_bvpo.data.empty_trace import DEFAULT_EMPTY_BLOCK, empty_block
from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.loading import OUR_COLUMNS, judge_dataset, length_lines
from megatron_bvpo.data.measuring import measure_dataset
from megatron_bvpo.data.pair_checks import IGNORED, Account, Loss, PairRules, check_pairs, response_start
from megatron_bvpo.data.rows import RowRules
from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import PAIR
from tests.unit.sample_folders import synthetic
from tests.unit.sample_rows import CHOSEN, OWN, REJECTED, row, talk

FOUR = ("chosen", "rejected", "empty_chosen", "empty_rejected")
TOOL = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
LONG = "Hm. " * 60


@pytest.fixture(scope="module")
def make(workshop):
    """Makes a BVPO template as a run does."""
    from swift.model import get_processor
    from swift.template import get_template

    logging.getLogger("swift").setLevel(logging.ERROR)

    def make(name="qwen3_thinking", streams=("trace", "empty"), loss_scale="last_round", **given):
        ours = {"count_unused": given.pop("count_unused", False)}
        block = given.pop("block", None)
        processor = get_processor(str(workshop.dense), model_type="qwen3")
        template = get_template(processor, template_type=name, loss_scale=loss_scale, **given)
        template.set_mode("rlhf")
        block = empty_block(template.template_meta.non_thinking_prefix, block)
        return make_bvpo_template(template, TemplateSettings(RowRules(streams=streams), block, **ours))

    return make


def split(template, encoded, name) -> tuple[str, str]:
    """Prompt and counted response of a sequence as texts."""
    ids, labels = encoded[f"{name}_input_ids"], encoded[f"{name}_labels"]
    start = response_start({"labels": labels})
    assert labels[start:] == ids[start:], "what counts is not one piece"
    return template.tokenizer.decode(ids[:start]), template.tokenizer.decode(ids[start:])


def losses(template, entry) -> dict[str, Loss]:
    return template.encode_with_account(entry)[1].lost


# --- one prompt ---

ROWS = {
    "plain": row(),
    "own answers": row(**OWN),
    "a conversation": {"messages": talk(), "rejected_messages": talk(REJECTED)},
    "history": {**row(), "messages": [*talk("<think>a</think>Hello."), *talk()]},
    "history that counts": {**row(), "messages": [talk()[0], {**talk("Hello.")[1], "loss": True}, *talk()]},
    "tools of the chosen": {"messages": talk(), "rejected_messages": talk(REJECTED), "tools": [TOOL]},
    "tools of the rejected": row(rejected_tools=[TOOL]),
    "settings of the chosen": {
        "messages": [*talk("<think>a</think>Hello."), *talk()],
        "rejected_messages": [*talk("<think>a</think>Hello."), *talk(REJECTED)],
        "chat_template_kwargs": {"preserve_thinking": True},
    },
    "white space in front": row(chosen=f"\n{CHOSEN}"),
    "one empty trace": row(chosen="<think>\n\n</think>\n\nIt is 4."),
    "no trace's opening": row(chosen=CHOSEN[8:]),
}


@pytest.mark.parametrize("name", ["qwen3_thinking", "qwen3", "deepseek_v3_1"])
@pytest.mark.parametrize("case", ROWS)
def test_all_four_answer_one_prompt_and_nothing_else_counts(case, name, make):
    scale = "last_round" if name == "qwen3_thinking" else "last_round+ignore_empty_think"  # as ms-swift has it
    template = make(name, loss_scale=scale)
    encoded, account = template.encode_with_account(ROWS[case])
    assert account == Account(("trace", "empty"))
    prompts, responses = zip(*(split(template, encoded, sequence) for sequence in FOUR), strict=True)
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3] == prompts[0] + template.bvpo.block
    assert ("weigh" in prompts[0]) == ("tools" in case)
    for response, text in zip(responses, (ROWS[case]["messages"][-1]["content"], REJECTED), strict=False):
        assert response.startswith("<think>") and response.count("<think>") == 1
        assert text.strip().removeprefix("<think>").strip() in response
    assert not any("think" in response for response in responses[2:])


OTHER_PROMPTS = {
    "other tools": (row(tools=[TOOL], rejected_tools=[OTHER]), "weigh"),
    "other settings": (
        {
            "messages": [*talk("<think>abc</think>Hello."), *talk()],
            "rejected_messages": [*talk("<think>abc</think>Hello."), *talk(REJECTED)],
            "chat_template_kwargs": {"preserve_thinking": True},
            "rejected_chat_template_kwargs": {"preserve_thinking": False},
        },
        "abc",
    ),
}


@pytest.mark.parametrize("streams", [("trace", "empty"), ("trace",), ("empty",)])
@pytest.mark.parametrize("case", OTHER_PROMPTS)
def test_another_prompt_costs_the_row(case, streams, make):
    entry, shown = OTHER_PROMPTS[case]
    lost = losses(make(streams=streams), entry)
    assert set(lost) == set(streams)
    for loss in lost.values():
        assert loss.reason == "the rejected response has another prompt than the chosen"
        assert loss.detail.startswith("from token ") and shown in loss.detail


def test_a_template_that_prefixes_one_side_only(make, monkeypatch):
    template = make()
    whole = type(template)._encode_truncated

    def prefixed(self, inputs):
        encoded = whole(self, inputs)
        if "5" in inputs.messages[-1]["content"]:
            encoded["input_ids"], encoded["labels"] = [9, *encoded["input_ids"]], [IGNORED, *encoded["labels"]]
        return encoded

    monkeypatch.setattr(type(template), "_encode_truncated", prefixed)
    assert set(losses(template, row())) == {"trace", "empty"}
    # Here the responses agree, and the answers of the empty pair do not.
    assert set(losses(template, row(rejected=REJECTED.replace("5", "6"), **OWN))) == {"empty"}


def test_a_template_that_adds_its_own_empty_trace(make):
    """A hybrid's template does not know the tags of --bvpo_empty_block, and writes its own block in front of them."""
    template = make("qwen3", loss_scale="last_round+ignore_empty_think", block="<thought>\n</thought>\n")
    (loss,) = losses(template, row()).values()
    assert loss.reason == "the empty pair's prompt is not the trace pair's with an empty trace"
    assert "<thought>" in loss.detail and "<think>" in loss.detail
    assert not losses(make(block="<thought>\n</thought>\n"), row())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("qwen3_thinking", {}),
        ("qwen3_thinking", {"rejected_response": ""}),
        ("qwen3", {"tools": [TOOL]}),
        ("deepseek_r1", {}),
    ],
)
def test_an_empty_pair_alone_is_encoded_as_beside_its_trace_pair(given, name, make):
    template = make(name)
    both, _ = template.encode_with_account({**row(**OWN), **given, "rejected_response": REJECTED})
    alone = {"messages": talk()[:1], **OWN, **given}
    encoded, account = template.encode_with_account(alone)
    assert account == Account(("empty",))
    assert not any(key.startswith(("chosen_input", "rejected_input")) for key in encoded)
    for sequence in FOUR[2:]:
        for what in ("input_ids", "labels"):
            assert encoded[f"{sequence}_{what}"] == both[f"{sequence}_{what}"]
    assert make(name, streams=("empty",)).encode_with_account(alone)[1] == Account(("empty",))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Rows of `bvpo pairs`, with pairs in both modes, in one of them, and in the other."""
    from megatron_bvpo.cli import bvpo

    folder = tmp_path_factory.mktemp("sampled")
    synthetic(folder / "samples", 40)
    assert bvpo(["pairs", str(folder / "samples"), "--out", str(folder / "pairs.jsonl")]) == 0
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    assert {tuple(row["numbers"]) for row in rows} == {("thinking", "empty"), ("thinking",), ("empty",)}
    return rows


@pytest.mark.parametrize("name", ["qwen3_thinking", "qwen3", "deepseek_r1"])
def test_rows_of_bvpo_pairs_keep_their_pairs_as_tokens(name, make, sampled):
    template = make(name)
    for entry in sampled:
        canonical, _ = Reading(template.bvpo.rules).canonical(entry)
        encoded, account = template.encode_with_account(canonical)
        traced = "thinking" in entry["numbers"]
        assert account == Account(("trace", "empty") if traced else ("empty",)), entry
        texts = (
            {"chosen": entry["messages"][-1]["content"], "rejected": entry.get("rejected_response")} if traced else {}
        )
        if "empty" in entry["numbers"]:
            texts |= {f"empty_{side}": entry[field] for side, field in zip(PAIR, OWN, strict=True)}
        for sequence, text in texts.items():
            prompt, response = split(template, encoded, sequence)
            assert text in f"{prompt.rpartition('<think>')[0]}{response}" and entry["messages"][0]["content"] in prompt


def test_an_empty_pair_alone_may_be_lost_as_tokens(make):
    template = make(max_length=30)
    entry = {"messages": talk()[:1], "empty_response": LONG, "empty_rejected_response": "5"}
    assert template.encode_with_account(entry)[1].lost.keys() == {"empty"}


# --- what counts ---


def test_earlier_turns_never_count(make):
    template = make(loss_scale="default")
    prompt, response = split(template, template.encode(ROWS["history that counts"]), "chosen")
    assert "Hello." in prompt and response.startswith("<think>\nTwo and two.")


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (f"{CHOSEN}<|im_end|>", "the same tokens on both sides"),
        (CHOSEN.replace("4", "caf\u00e9"), None),
        (
            f"{REJECTED}<|im_end|>\n<|im_start|>user\nAnd 3+3?",
            "control tokens of the template in the rejected response",
        ),
        (f"<think>\n<|im_start|>user\nWhat?{REJECTED[7:]}", "control tokens of the template in the rejected response"),
        (f"{REJECTED}<|im_end|>", None),
        (f"{REJECTED}<|fim_pad|>", None),  # a word of the model's, not of the talk's frame
    ],
)
def test_responses_as_tokens(rejected, reason, make):
    lost = losses(make(), row(rejected=rejected, **OWN))
    assert {stream: loss.reason for stream, loss in lost.items()} == ({"trace": reason} if reason else {})


def test_texts_that_are_the_same_tokens(make):
    """Two spellings of one letter: other texts, and the tokenizer makes one of them."""
    composed, decomposed = (CHOSEN.replace("4", f"caf{e}") for e in ("\u00e9", "e\u0301"))
    assert composed != decomposed
    lost = losses(make(), row(composed, decomposed))
    assert {loss.reason for loss in lost.values()} == {"the same tokens on both sides"} and len(lost) == 2


# --- cut ---


def prompt_tokens(make) -> int:
    return response_start({"labels": make().encode(row())["chosen_labels"]})


def test_a_prompt_longer_than_the_limit_leaves_nothing(make):
    limit = prompt_tokens(make)
    for strategy in ("right", "raise"):
        lost = losses(make(max_length=limit, truncation_strategy=strategy), row())
        assert set(lost) == {"trace", "empty"}
        assert all(f"--max_length {limit}" in loss.reason for loss in lost.values())


@pytest.mark.parametrize("strategy", ["right", "left", "raise"])
def test_a_trace_that_is_lost_leaves_the_empty_pair(strategy, make):
    template = make(max_length=60, truncation_strategy=strategy)
    long = row(f"<think>\n{LONG}\n</think>\n\n4", f"<think>\n{LONG}\n</think>\n\n5")
    encoded, account = template.encode_with_account(long, return_length=True)
    assert (account.pairs, set(account.lost), account.cut) == (("empty",), {"trace"}, ())
    reason = {
        "right": "the same tokens on both sides within --max_length 60",
        "left": "no prompt within --max_length 60",
        "raise": "longer than --max_length 60",
    }
    assert account.lost["trace"].reason == reason[strategy]
    assert not any(key.startswith(("chosen_input", "rejected_input")) for key in encoded)
    assert encoded["lengths"][:2] == [0, 0] and all(encoded["lengths"][2:])
    collated = template.data_collator([encoded, make().encode(row())])
    assert (collated[LAYOUT_KEY].count("trace"), collated[LAYOUT_KEY].count("empty")) == (1, 2)


def test_right_cuts_responses_that_still_differ(make):
    template = make(max_length=60, truncation_strategy="right", streams=("trace",))
    encoded, account = template.encode_with_account(
        row(f"<think>\nTwo. {LONG}</think>4", f"<think>\nA {LONG}</think>5")
    )
    assert account == Account(("trace",), cut=("trace",))
    (prompt, chosen), (other_prompt, rejected) = (split(template, encoded, side) for side in PAIR)
    assert prompt == other_prompt == split(template, make().encode(row()), "chosen")[0]
    assert chosen.startswith("<think>\nTwo.") and rejected.startswith("<think>\nA")
    assert [len(encoded[f"{side}_input_ids"]) for side in PAIR] == [60, 60]


def test_left_cuts_the_prompt_alike_on_both_sides(make):
    entry = row(f"<think>\n{'Hm. ' * 10}\n</think>\n\n4", "<think>\nOh.\n</think>\n\n5")
    entry["messages"] = [{"role": "user", "content": f"First. {LONG}Last."}, entry["messages"][1]]
    whole = make().encode(entry)
    template = make(max_length=100, truncation_strategy="left")
    encoded, account = template.encode_with_account(entry)
    assert account == Account(("trace", "empty"), cut=("trace", "empty"))
    for pair in (FOUR[:2], FOUR[2:]):
        prompts, responses = zip(*(split(template, encoded, name) for name in pair), strict=True)
        assert prompts[0] == prompts[1] and "First." not in prompts[0] and "Last." in prompts[0]
        assert responses == tuple(split(template, whole, name)[1] for name in pair)
        assert max(len(encoded[f"{name}_input_ids"]) for name in pair) == 100
    assert prompts[0].endswith(DEFAULT_EMPTY_BLOCK)


TOKENS = st.lists(st.integers(1, 3), max_size=6)


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 12), st.sampled_from(["right", "left", "raise"]), st.booleans())
@settings(deadline=None, max_examples=300)
def test_what_is_kept_can_be_trained(prompt, chosen, rejected, limit, truncation, other):
    """Whatever is cut: one prompt, a response on both sides, a difference, and no more tokens than allowed."""
    prompts = {"chosen": [0, *prompt], "rejected": [0, *prompt, *([2] if other else [])]}
    pair = {}
    for side, response in zip(PAIR, (chosen, rejected), strict=True):
        ids = [*prompts[side], 7, *response, 8, 9]
        labels = [IGNORED] * (len(prompts[side]) + 1) + [*response, 8, 9]
        pair[side] = {"input_ids": ids, "labels": labels, "length": len(ids), "loss_scale": None}
    rules = PairRules(limit, truncation, (), frozenset([8]), (8, 9), decode=str)
    kept, account = check_pairs({"trace": pair}, rules)
    assert (account.pairs == ("trace",)) == bool(kept) != bool(account.lost)
    assert Account.from_json(account.to_json()) == account
    if not kept:
        return
    assert not other and chosen != rejected
    starts = {side: response_start(sequence) for side, sequence in kept["trace"].items()}
    found = {side: sequence["input_ids"] for side, sequence in kept["trace"].items()}
    assert found["chosen"][: starts["chosen"]] == found["rejected"][: starts["rejected"]] != []
    assert found["chosen"][starts["chosen"] :] != found["rejected"][starts["rejected"] :] != []
    for side, sequence in kept["trace"].items():
        assert len(sequence["labels"]) == sequence["length"] == len(found[side]) <= limit
        assert found[side] == pair[side]["input_ids"][: limit or None] or truncation == "left"


# --- the account ---


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
