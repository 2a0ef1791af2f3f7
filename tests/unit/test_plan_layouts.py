"""Shapes of models that `bvpo plan` knows, and the rules of layouts with the neighbours that work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning import layout as layouts
from megatron_bvpo.planning.layout import Cluster, check_with_neighbours, layout_name, stage_layers
from megatron_bvpo.planning.memory import stage_chunks
from megatron_bvpo.planning.model_shapes import UnplannedModelError, model_shape, shape_from_config
from megatron_bvpo.planning.reading import settings_from
from tests.unit.planned_runs import DENSE, FULL, LARGE, MOE, settings

ROOT = Path(__file__).resolve().parents[2]


# ---- shapes


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # in billions, as the models' cards round them
        (LARGE, 235, 22),
        (MOE, 30.5, 3.3),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78, 1.78),
        ("DeepSeek-R1-Distill-Qwen-7B", 7.62, 7.62),
        (DENSE, 8.19, 8.19),
    ],
)
def test_parameters_of_the_named_models(name, total, active):
    shape = model_shape(name)
    assert shape.total_parameters / 1e9 == pytest.approx(total, rel=5e-3)
    whole = shape.active_matrices + 2 * shape.vocab * shape.hidden
    assert whole / 1e9 == pytest.approx(active, rel=2e-2)


def test_qwen2_has_biases_and_qwen3_norms_per_head():
    old, new = model_shape("DeepSeek-R1-Distill-Qwen-1.5B"), model_shape(DENSE)
    assert (old.qkv_bias, old.qk_norm) == (True, False) and (new.qkv_bias, new.qk_norm) == (False, True)
    assert old.total_parameters == 1_777_088_000


@pytest.mark.parametrize("name", [MOE, DENSE, "DeepSeek-R1-Distill-Qwen-7B"])
def test_tensors_of_one_rank_are_all_parameters(name):
    shape = model_shape(name)
    chunks = stage_chunks(shape, settings_from(FULL), 0)
    assert sum(t.elements for chunk in chunks for t in chunk) == shape.total_parameters


def test_shipped_shapes_are_those_of_transformers():
    """The package's own configuration classes read the files: no key of ours is misspelt."""
    transformers = pytest.importorskip("transformers")
    kinds = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig"}
    for file in (ROOT / "megatron_bvpo/planning/shapes").glob("*.json"):
        values = json.loads(file.read_text())
        config = getattr(transformers, kinds[values["model_type"]])(**values)
        assert set(values) <= set(config.to_dict()) | {"attention_bias", "num_experts"}, file
        assert shape_from_config(values, file.stem).head_dim * config.num_attention_heads > 0


@pytest.mark.parametrize(
    ("model", "message"),
    [("nobody/no-such-model", "no folder with a config.json"), ("FOLDER", "model_type: is 'mamba', which the plan")],
)
def test_unknown_models_are_refused(model, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match=message):
        model_shape(str(tmp_path) if model == "FOLDER" else model)


FAMILIES = {  # what their config.json says, and what the refusal must name
    "Qwen3_5MoeConfig": ("'qwen3_5_moe' (Qwen3_5MoeForConditionalGeneration)", "linear attention", "shared expert"),
    "Qwen3_5Config": ("'qwen3_5' (Qwen3_5ForConditionalGeneration)", "linear attention"),
    "Qwen3NextConfig": ("'qwen3_next' (Qwen3NextForCausalLM)", "linear attention", "shared expert"),
    "DeepseekV3Config": ("'deepseek_v3' (DeepseekV3ForCausalLM)", "latent attention", "shared experts"),
    "Glm4MoeConfig": ("'glm4_moe' (Glm4MoeForCausalLM)", "shared experts"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_is_not_planned_is_named(name):
    """The real config.json of transformers' own class, with the architecture that a checkpoint would add."""
    transformers = pytest.importorskip("transformers")
    values = json.loads(getattr(transformers, name)().to_json_string(use_diff=False))
    values["architectures"] = [FAMILIES[name][0].split("(")[1].rstrip(")")]
    with pytest.raises(UnplannedModelError) as raised:
        shape_from_config(values, name)
    said = str(raised.value)
    assert "\n" not in said
    for words in (*FAMILIES[name], "It knows qwen2, qwen3, qwen3_moe", "train without a plan"):
        assert words in said, (words, said)


def test_a_missing_size_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_attention_heads": 8}))
    with pytest.raises(UserError, match="hidden_size is missing"):
        model_shape(str(tmp_path))


# ---- rules


@pytest.mark.parametrize(
    ("model", "values", "field", "works"),
    [
        (MOE, dict(tensor_model_parallel_size=3), "tensor_model_parallel_size", "TP"),
        (MOE, dict(tensor_model_parallel_size=2), "sequence_parallel", "TP2"),
        (MOE, dict(expert_model_parallel_size=3), "expert_model_parallel_size", "EP"),
        (MOE, dict(pipeline_model_parallel_size=5), "tensor_model_parallel_size", "PP"),
        (LARGE, dict(pipeline_model_parallel_size=4), "pipeline_model_parallel_size", "first stage 23"),
        (DENSE, dict(expert_model_parallel_size=2), "expert_model_parallel_size", "one rank a replica"),
        (DENSE, dict(global_batch_size=9), "global_batch_size", "CP8"),
        (DENSE, dict(context_parallel_size=3), "tensor_model_parallel_size", "CP"),
        (DENSE, dict(max_length=10**6), "max_length", ""),
        (
            DENSE,
            dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=4),
            "pipeline_model_parallel_size",
            "PP",
        ),
        (
            DENSE,
            dict(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3, global_batch_size=6),
            "global_batch_size",
            "PP",
        ),
        (
            LARGE,
            dict(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=23),
            "pipeline_model_parallel_size",
            "PP",
        ),
    ],
)
def test_a_layout_that_cannot_work_names_its_key_and_neighbours(model, values, field, works):
    run = settings(**{"global_batch_size": 16, **values})
    with pytest.raises(UserError) as found:
        check_with_neighbours(run, model_shape(model), Cluster(1, 8))
    assert found.value.field == field, str(found.value)
    assert works in found.value.remedy


def test_tensor_parallelism_stays_in_a_node():
    run = settings(tensor_model_parallel_size=16, sequence_parallel=True)
    with pytest.raises(UserError, match="spans nodes of 8"):
        check_with_neighbours(run, model_shape(LARGE), Cluster(2, 8))


def test_every_neighbour_works():
    run = settings(pipeline_model_parallel_size=4, global_batch_size=32)
    shape, cluster = model_shape(LARGE), Cluster(4, 8)
    near = layouts.nearest_layouts(run, shape, cluster)
    assert len(near) == 3 and len({layout_name(s) for s in near}) == 3
    for other in near:
        check_with_neighbours(other, shape, cluster)
        assert sum(stage_layers(other, shape.layers)) == 94


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (dict(pipeline_model_parallel_size=4), [24, 24, 24, 24]),
        (dict(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=23), [23, None]),
        (
            dict(
                pipeline_model_parallel_size=4,
                decoder_first_pipeline_num_layers=23,
                decoder_last_pipeline_num_layers=25,
            ),
            [23, 24, 24, 25],
        ),
        (
            dict(
                pipeline_model_parallel_size=2,
                account_for_embedding_in_pipeline_split=True,
                account_for_loss_in_pipeline_split=True,
            ),
            [48, 48],
        ),
    ],
)
def test_layers_of_the_stages(values, layers):
    run = settings(**values)
    if None in layers:
        with pytest.raises(UserError, match="73 layers between"):
            stage_layers(run, 96)
    else:
        assert stage_layers(run, 96) == layers


def test_virtual_stages_of_an_uneven_pipeline():
    uneven = dict(decoder_first_pipeline_num_layers=23, decoder_last_pipeline_num_layers=25)
    run = settings(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2, **uneven)
    with pytest.raises(UserError, match="23 layers of a stage cannot be split into 2 virtual stages"):
        stage_layers(run, 96)
