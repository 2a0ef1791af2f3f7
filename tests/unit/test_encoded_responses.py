"""Rows of single responses, demonstrations and a gate, through ms-swift's own template and into a batch."""

from __future__ import annotations

import logging

import pytest

from megatron_bvpo.data.batches import LAYOUT_KEY, ROW_KEY, WEIGHT_KEY, TemplateSettings, make_bvpo_template
from megatron_bvpo.data.empty_trace import DEFAULT_EMPTY_BLOCK
from megatron_bvpo.data.encoded_rows import has_stream, tokens_of
from megatron_bvpo.data.pair_checks import response_start
from megatron_bvpo.data.rows import RowRules
from megatron_bvpo.gradients.halves import one_stream
from tests.unit.sample_rows import CHOSEN, OWN, REJECTED, row, talk

KTO = RowRules(streams=("trace", "empty", "expert"), unpaired=True)
GATE = RowRules(streams=("trace", "empty", "expert"), gate_threshold=0.0)
EXPERT = {"expert_response": "<think>\n2+2\n</think>\n\nFour."}
ALONE = {"messages": talk()[:1], "empty_response": "4", "empty_label": 0}


@pytest.fixture(scope="module")
def make(workshop):
    """Makes a BVPO template with these rules."""
    from swift.model import get_processor
    from swift.template import get_template

    logging.getLogger("swift").setLevel(logging.ERROR)

    def make(rules: RowRules):
        processor = get_processor(str(workshop.dense), model_type="qwen3")
        template = get_template(processor, template_type="qwen3_thinking", padding_free=True)
        template.set_mode("rlhf")
        return make_bvpo_template(template, TemplateSettings(rules, DEFAULT_EMPTY_BLOCK))

    return make


def texts(template, encoded) -> dict[str, tuple[str, str]]:
    """By the sequences' names, prompt and counted response."""
    found = {}
    for name in (key.removesuffix("_input_ids") for key, value in encoded.items() if key.endswith("_input_ids")):
        ids, start = encoded[f"{name}_input_ids"], response_start({"labels": encoded[f"{name}_labels"]})
        assert encoded[f"{name}_labels"][start:] == ids[start:], "what counts is not one piece"
        found[name] = template.tokenizer.decode(ids[:start]), template.tokenizer.decode(ids[start:])
    return found


def test_a_single_response_is_one_sequence_a_stream(make):
    template = make(KTO)
    encoded = template.encode({"messages": talk(), "rejected_response": REJECTED, "label": True, **EXPERT})
    found = texts(template, encoded)
    assert set(found) == {"response", "empty_response", "expert_response"}
    assert found["response"][1].startswith(CHOSEN) and found["expert_response"][1].startswith("<think>\n2+2")
    assert found["empty_response"][1].startswith("It is 4.")
    assert found["empty_response"][0] == found["response"][0] + DEFAULT_EMPTY_BLOCK
    assert not any("guess" in text for pair in found.values() for text in pair), "the rejected side is not read"
    assert texts(template, template.encode(ALONE)).keys() == {"empty_response"}


def test_a_batch_of_single_responses(make):
    template = make(KTO)
    rows = [{"messages": talk(), "label": 0, **EXPERT}, ALONE, {"messages": talk(REJECTED), "label": "true"}]
    encoded = [{**template.encode(entry), ROW_KEY: i} for i, entry in enumerate(rows)]
    encoded[2][WEIGHT_KEY] = 0.0
    layout = template.data_collator(encoded)[LAYOUT_KEY]
    assert layout.rows == {"trace": (0, 2), "empty": (0, 1, 2), "expert": (0,)}
    assert layout.right == {"trace": (False, True), "empty": (False, False, True)}
    assert layout.weights["empty"] == (1.0, 1.0, 0.0) and layout.real_count("trace") == 1
    assert [layout.slices(stream) for stream in layout.rows] == [(slice(0, 2),), (slice(2, 5),), (slice(5, 6),)]


def test_one_stream_of_single_responses(make):
    template = make(KTO)
    encoded = [template.encode(entry) for entry in ({"messages": talk(), "label": 1}, ALONE)]
    (trace,) = one_stream(encoded, "trace")
    assert has_stream(trace, "trace") and not has_stream(trace, "empty")
    (filler,) = one_stream(encoded[1:], "trace")
    assert filler[WEIGHT_KEY] == 0.0 and tokens_of(filler, "empty") and template.data_collator([filler])[LAYOUT_KEY]


@pytest.mark.parametrize(("rate", "streams"), [(0.0, {"expert"}), (0.5, {"trace", "empty"})])
def test_what_a_gate_switches_off_is_not_encoded(make, rate, streams):
    template = make(GATE)
    encoded = template.encode(row(**OWN, **EXPERT, accept_rate=rate))
    assert {stream for stream in GATE.streams if has_stream(encoded, stream)} == streams
    cut = row(**OWN) if rate else {"messages": talk()[:1], **EXPERT}
    without = template.encode({**cut, "accept_rate": rate})
    assert {k: v for k, v in encoded.items() if k.endswith("_ids")} == {
        k: v for k, v in without.items() if k.endswith("_ids")
    }
