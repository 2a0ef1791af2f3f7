"""Layout rules: which are accepted, and what the message of a refusal proposes."""

from __future__ import annotations

import re
import types

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.layout_rules import check_layout, check_model_fits

DEFAULTS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "micro_batch_size": 1,
    "global_batch_size": 16,
    "sequence_parallel": False,
    "tuner_type": "lora",
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
SHORT = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "ep": "expert_model", "etp": "expert_tensor"}


COUNTED = (*SHORT, "micro_batch_size", "virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers")


def arguments(**given) -> types.SimpleNamespace:
    long = {f"{SHORT[k]}_parallel_size" if k in SHORT else k: v for k, v in given.items()}
    return types.SimpleNamespace(**DEFAULTS | long)


def model(**given) -> types.SimpleNamespace:
    sizes = {"num_attention_heads": 64, "num_key_value_heads": 4, "num_hidden_layers": 94, "num_experts": 128}
    return types.SimpleNamespace(**sizes | given)


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, 1),
        ({}, 16),
        ({"tp": 2, "pp": 2, "cp": 2}, 16),
        ({"ep": 8, "pp": 2}, 16),
        ({"ep": 4, "tp": 4}, 8),
        ({"pp": 2, "virtual_pipeline_model_parallel_size": 2, "global_batch_size": 4}, 4),
        ({"micro_batch_size": 4, "global_batch_size": 8}, 2),
        ({"virtual_pipeline_model_parallel_size": 1}, 2),  # ms-swift's word for none
    ],
)
def test_layouts_that_fit(given, ranks):
    check_layout(arguments(**given), ranks)


@pytest.mark.parametrize(
    ("given", "ranks", "told"),
    [
        ({"tp": 4, "pp": 2}, 12, "12 ranks cannot be split into TP 4 × PP 2 × CP 1 = 8; start a multiple of 8"),
        ({"ep": 8, "pp": 4}, 16, "expert TP 1 × EP 8 × PP 4 = 32. EP can be 1, 2, 4 here"),
        ({"global_batch_size": 7, "micro_batch_size": 2}, 2, "global batch 7 .* 2 × data parallel 2 = 4; use 4"),
        ({"global_batch_size": 1}, 4, "global batch 1 .* data parallel 4 = 4; use 4"),
        ({"global_batch_size": 0}, 1, "global batch 0 .*; use 1"),
        (
            {"pp": 4, "virtual_pipeline_model_parallel_size": 2, "global_batch_size": 6},
            4,
            "6 micro-batches a step cannot fill 4 .*; use a multiple of 4",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, 4, "virtual pipelining with 2 chunks .* PP is 1; leave the flag"),
        *[({size: 0}, 1, f"--.*{SHORT.get(size, size)}.*: is 0; expected 1 or more") for size in COUNTED],
        ({"tp": -2}, 1, "tensor_model_parallel_size: is -2"),
    ],
)
def test_layouts_that_do_not(given, ranks, told):
    with pytest.raises(UserError, match=told):
        check_layout(arguments(**given), ranks)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"tp": 4, "sequence_parallel": True, "ep": 8}, {}),
        ({"tp": 8, "sequence_parallel": True}, {}),  # key/value heads are copied
        ({"pp": 2}, {}),
        ({"pp": 4, "decoder_first_pipeline_num_layers": 22, "decoder_last_pipeline_num_layers": 24}, {}),
        ({"pp": 4, "account_for_embedding_in_pipeline_split": True}, {}),
        ({"tp": 2}, {"num_experts": None}),
        ({"ep": 4}, {"num_experts": None, "n_routed_experts": 256}),
        ({"etp": 2, "tuner_type": "full"}, {}),
    ],
)
def test_models_that_fit(given, sizes):
    check_model_fits(arguments(**given), model(**sizes))
    check_model_fits(arguments(**given), types.SimpleNamespace(text_config=model(**sizes)))


@pytest.mark.parametrize(
    ("given", "sizes", "told"),
    [
        ({"tp": 3}, {}, "64 attention heads cannot be split over TP 3. TP can be 1, 2, 4, 8, 16, 32, 64"),
        ({"tp": 3}, {"num_attention_heads": 48}, "4 key/value heads do not fit TP 3. TP can be 1, 2, 4"),
        ({"pp": 4}, {}, r"94 layers .* 4 pipeline chunks \(PP 4\). PP can be 1, 2, 47, 94, or give --decoder_first"),
        ({"pp": 2, "virtual_pipeline_model_parallel_size": 2}, {}, "94 layers .* 4 pipeline chunks"),
        ({"ep": 3}, {}, "128 experts cannot be split over EP 3. EP can be 1, 2, 4, 8, 16, 32, 64, 128"),
        ({"tp": 2}, {}, "a mixture of experts with TP 2 needs sequence parallelism; add --sequence_parallel true"),
        ({"ep": 2}, {"num_experts": None}, "the model has no experts, so EP 2 has nothing to split; use EP 1"),
        ({"etp": 2}, {}, "LoRA on experts does not work with expert TP 2"),
    ],
)
def test_models_that_do_not(given, sizes, told):
    with pytest.raises(UserError, match=told) as caught:
        check_model_fits(arguments(**given), model(**sizes))
    assert re.fullmatch(r"--\w+", caught.value.field), "the flag to change is named"
