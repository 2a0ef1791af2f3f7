"""Templates as a run has them, with the tokenizer of a tiny model, and sequences that they encode."""

from __future__ import annotations

import logging

from megatron_bvpo.data.batches import TemplateSettings, make_bvpo_template
from megatron_bvpo.data.empty_trace import empty_block
from megatron_bvpo.data.pair_checks import Loss, response_start
from megatron_bvpo.data.rows import RowRules

FOUR = ("chosen", "rejected", "empty_chosen", "empty_rejected")
TOOL = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
LONG = "Hm. " * 60


def template_maker(workshop):
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
