"""Which layers of a model are new, as its config.json says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.growth.grown_config import NEW_LAYERS
from megatron_bvpo.host.grown_layers import KEY, new_layer_numbers
from megatron_bvpo.planning.model_shapes import shape_from_config


def config(found, layers: int = 6):
    return SimpleNamespace(num_hidden_layers=layers, **({} if found is None else {KEY: found}))


def test_the_key_is_one_for_all_who_read_it():
    sizes = dict(hidden_size=8, num_attention_heads=2, vocab_size=9, intermediate_size=4, num_hidden_layers=6)
    assert KEY == NEW_LAYERS
    assert shape_from_config({"model_type": "qwen3", **sizes, KEY: [2, 4]}, "grown").new_layers == (2, 4)


def test_numbers():
    assert new_layer_numbers(config([4, 2]), "folder") == (2, 4)


@pytest.mark.parametrize("found", [None, [], "2,4", [2, 6], [-1], [2.0], [True]])
def test_a_model_that_was_not_grown_is_refused(found):
    with pytest.raises(UserError) as refused:
        new_layer_numbers(config(found), "folder")
    assert refused.value.field == "--bvpo_new_layers_only" and refused.value.file == "folder"
    assert "make the model with bvpo expand" in str(refused.value)
