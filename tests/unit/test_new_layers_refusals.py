"""Settings that do not go with training the new layers of a grown model, alone or beside adapters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.refusals import refusals
from megatron_bvpo.planning.checks import check_run
from megatron_bvpo.planning.reading import settings_from

# New layers whole, adapters on the others.
BESIDE = {"max_length": 1, "tuner_type": "lora", "bvpo_new_layers_only": True}


def test_new_layers_are_resumed_from_megatrons_files():
    given = {"max_length": 1, "bvpo_new_layers_only": True, "mcore_model": "there", "finetune": False}
    assert "mcore_model" not in {flag for said, flag, _, _ in refusals(settings_from(given)) if said}


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("adapters", ["there"], "the reference is the old model, and the adapters on it begin anew"),
        ("ref_adapters", ["there"], "the reference is the old model"),
        ("mcore_ref_adapter", "there", "the reference is the old model"),
        ("mcore_model", "there", "known by its files in Hugging Face's form"),
        ("modules_to_save", ["word_embeddings"], "whole modules beside whole layers"),
        ("merge_lora", False, "are no model that can be loaded"),
        ("fp8_param_gather", True, "not known for 8-bit parameters"),
        ("ref_model", "there", "the model without them, so nothing would read it"),
        ("freeze_parameters", ["decoder"], "adapters leave every base weight as it is"),
    ],
)
def test_what_does_not_go_with_whole_layers_beside_adapters(flag, value, said):
    given = SimpleNamespace(**vars(settings_from(BESIDE)) | {flag: value})  # of the run's: a plan takes fewer
    ((name, reason),) = [(name, why) for refused, name, why, _ in refusals(given) if refused]
    assert name == flag and said in reason


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_modules": ["all-linear", "all-router"], "use_rslora": True},
        {"freeze_parameters_regex": r".*\.router\.weight"},
        {"merge_lora": False, "save_safetensors": False},
        {"mcore_adapter": "there", "finetune": False},
    ],
)
def test_whole_layers_beside_adapters_go(more):
    assert not [flag for said, flag, _, _ in refusals(settings_from(BESIDE | more)) if said]


@pytest.mark.parametrize("flag", ["ref_model", "mcore_ref_model"])
def test_new_layers_have_their_reference_in_the_model(flag):
    with pytest.raises(UserError, match=rf"{flag}: is 'there': the reference is the model without its new layers"):
        check_run(settings_from({"max_length": 1, "bvpo_new_layers_only": True, flag: "there"}), "run.yaml")
