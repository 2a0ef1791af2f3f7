"""`bvpo plan` of a model that `bvpo expand` has grown."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.activations import micro_batch_activations
from megatron_bvpo.planning.command import make_plan
from megatron_bvpo.planning.costs import lora_elements_a_token, micro_batch_flops
from megatron_bvpo.planning.layout import Cluster
from megatron_bvpo.planning.memory import Lengths, micro_batch, stage_chunks, static_memory
from megatron_bvpo.planning.model_shapes import SHIPPED, model_shape, shape_from_config
from megatron_bvpo.planning.reading import settings_from

GROWN = "Qwen3-30B-A3B-Thinking-2507-upper-half"


def test_a_grown_model_has_its_new_layers_and_trains_those_alone():
    """24 of 72 layers: their gradients and moments, and no reference model beside the policy."""
    old, grown = model_shape("Qwen3-30B-A3B-Thinking-2507"), model_shape(GROWN)
    assert grown.layers == 72 and grown.new_layers == tuple(range(24, 72, 2))
    a_layer = (grown.total_parameters - old.total_parameters) / 24
    run = settings_from({"max_length": 1024, "expert_model_parallel_size": 8, "bvpo_alpha": 0.5})
    alone = dataclasses.replace(run, bvpo_new_layers_only=True)
    whole, new = (static_memory(grown, r, 8, 0) for r in (run, alone))
    trained = sum(t.elements for c in stage_chunks(grown, alone, 0) for t in c if t.trained)
    held = sum(t.elements for c in stage_chunks(grown, alone, 0) for t in c)
    experts = grown.experts * grown.expert_matrices
    assert trained == pytest.approx(24 * (a_layer - experts * 7 / 8), rel=1e-6)
    assert new["reference_model"] == 0 and whole["reference_model"] == held * 2
    assert new["gradients"] == pytest.approx(trained * 4, rel=0.01)
    assert new["gradients"] < 0.4 * whole["gradients"] and new["optimizer"] < 0.4 * whole["optimizer"]


def test_new_layers_whole_and_adapters_on_the_others():
    """Gradients and moments of both; the new layers have no adapter, and there is no second model."""
    grown = model_shape(GROWN)
    run = settings_from({"max_length": 1024, "expert_model_parallel_size": 8, "bvpo_alpha": 0.5, "tuner_type": "lora"})
    beside = dataclasses.replace(run, bvpo_new_layers_only=True)
    alone = dataclasses.replace(beside, tuner_type="full")

    def trained(run, adapters: bool) -> int:
        tensors = [t for chunk in stage_chunks(grown, run, 0) for t in chunk]
        return sum(t.elements for t in tensors if t.trained and t.adapter is adapters)

    assert trained(beside, False) == trained(alone, False) > 0
    assert trained(beside, True) * 72 == trained(run, True) * 48 > 0
    found = static_memory(grown, beside, 8, 0)
    assert found["reference_model"] == 0
    assert found["gradients"] == pytest.approx(4 * (trained(beside, True) + trained(beside, False)), rel=0.01)


def test_layers_of_two_kinds_are_counted_as_the_one_that_saves_more():
    """A step's work is that of adapters, but for the new layers': what those cost to train the reference is without."""
    grown = model_shape(GROWN)
    run = settings_from({"max_length": 1024, "expert_model_parallel_size": 8, "tuner_type": "lora"})
    beside = dataclasses.replace(run, bvpo_new_layers_only=True)
    whole = dataclasses.replace(run, tuner_type="full")
    batch = micro_batch(run, Lengths(1024, 512))
    kept = [micro_batch_activations(grown, r, batch, layers=72).kept for r in (run, whole, beside)]
    assert kept[0] != kept[1] and kept[2] == max(kept[:2])
    adapters = 6 * batch.tokens * lora_elements_a_token(grown, run)
    work = [micro_batch_flops(grown, r, batch) for r in (run, beside)]
    assert work[1] == pytest.approx(work[0] - adapters * 24 / 72, rel=1e-12)


@pytest.mark.parametrize("vpp", [None, 2])
def test_new_layers_are_counted_on_the_stage_that_has_them(vpp):
    """In Megatron's order of virtual stages: 72 layers as 4 stages of 2 chunks are chunks of 9, dealt in turn."""
    grown = model_shape(GROWN)
    values = {"max_length": 1024, "pipeline_model_parallel_size": 4, "bvpo_new_layers_only": True}
    run = settings_from(values | ({"virtual_pipeline_model_parallel_size": vpp} if vpp else {}))
    counts = []
    for stage in range(4):
        chunks = stage_chunks(grown, run, stage)
        counts.append([sum(t.trained for t in chunk) / (7 + 2 * grown.experts) for chunk in chunks])
    assert counts == ([[0], [6], [9], [9]] if vpp is None else [[0, 5], [0, 4], [2, 5], [4, 4]])


def test_a_model_that_was_not_grown_has_no_new_layers_to_train(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("model: Qwen3-30B-A3B-Thinking-2507\nmax_length: 1024\nbvpo_new_layers_only: true\n")
    with pytest.raises(
        UserError, match="bvpo_new_layers_only: is true, and .* no layers that are known to be new; make"
    ):
        make_plan(str(run), Cluster())


def test_new_layers_that_are_no_layers_are_refused(tmp_path):
    config = json.loads((SHIPPED / f"{GROWN}.json").read_text())
    with pytest.raises(UserError, match=r"bvpo_new_layers: is \[72\]; expected numbers of the model's 72 layers"):
        shape_from_config(config | {"bvpo_new_layers": [72]}, "grown")
