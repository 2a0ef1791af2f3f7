"""Which layers of a model are new, as its config.json says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.growth import grown_config
from megatron_bvpo.host.grown_layers import new_layer_numbers
from megatron_bvpo.launching.new_layers import KEY, NOTE, carry_along
from megatron_bvpo.planning.model_shapes import shape_from_config


def config(found, layers: int = 6):
    return SimpleNamespace(num_hidden_layers=layers, **({} if found is None else {KEY: found}))


def test_the_key_is_one_for_all_who_read_it():
    sizes = dict(hidden_size=8, num_attention_heads=2, vocab_size=9, intermediate_size=4, num_hidden_layers=6)
    assert (KEY, NOTE) == (grown_config.NEW_LAYERS, grown_config.NOTE)
    assert shape_from_config({"model_type": "qwen3", **sizes, KEY: [2, 4]}, "grown").new_layers == (2, 4)


def test_numbers():
    assert new_layer_numbers(config([4, 2]), "folder") == (2, 4)


@pytest.mark.parametrize("only", [True, False])
def test_what_trained_all_layers_has_no_new_ones(tmp_path, only):
    """Or a later run would take that model without some of its layers for the old one."""
    model, saved = tmp_path / "model", tmp_path / "checkpoint-1"
    for folder in (model, saved):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({KEY: [2, 4], "num_hidden_layers": 6}))
    for name in ("expansion.json", "generation_config.json"):
        (model / name).write_text("{}")
    carry_along(model, saved, only)
    assert json.loads((saved / "config.json").read_text()).get(KEY) == ([2, 4] if only else None)
    assert (saved / "expansion.json").exists() is only and (saved / "generation_config.json").exists()


@pytest.mark.parametrize("found", [None, [], "2,4", [2, 6], [-1], [2.0], [True]])
def test_a_model_that_was_not_grown_is_refused(found):
    with pytest.raises(UserError) as refused:
        new_layer_numbers(config(found), "folder")
    assert refused.value.field == "--bvpo_new_layers_only" and refused.value.file == "folder"
    assert "make the model with bvpo expand" in str(refused.value)
