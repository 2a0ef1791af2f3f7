"""What `bvpo plan` works out: shapes, rules, buffers, arithmetic. tests/distributed/test_plan_memory.py has tensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning import layout as layouts
from megatron_bvpo.planning import memory
from megatron_bvpo.planning.activations import Batch, chunks_in_flight, micro_batch_activations
from megatron_bvpo.planning.buffers import make_buffer
from megatron_bvpo.planning.costs import micro_batch_flops, step_costs
from megatron_bvpo.planning.layout import Cluster, check_with_neighbours, groups_of, layout_name, stage_layers
from megatron_bvpo.planning.memory import (
    Lengths,
    all_stages,
    fullest,
    longest_trace,
    micro_batch,
    stage_chunks,
    static_memory,
)
from megatron_bvpo.planning.model_shapes import SHIPPED, UnplannedModelError, model_shape, shape_from_config
from megatron_bvpo.planning.reading import settings_from
from megatron_bvpo.planning.suggest import suggestions
from megatron_bvpo.planning.tensors import Tensor

ROOT = Path(__file__).resolve().parents[2]
MOE, LARGE, DENSE = "Qwen3-30B-A3B-Thinking-2507", "Qwen3-235B-A22B-Thinking-2507", "DeepSeek-R1-0528-Qwen3-8B"
LORA = dict(tuner_type="lora", lora_rank=16, lora_dropout=0, max_length=4096)
FULL = dict(tuner_type="full", max_length=4096)
OFFLOADED = dict(optimizer_cpu_offload=True, use_precision_aware_optimizer=True)


def settings(**values):
    return settings_from({**LORA, **values})


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


# ---- buffers


def test_buffer_of_the_distributed_optimizer():
    """By hand: parameters start at multiples of 64, the bucket ends at a multiple of lcm(ranks, 128)."""
    tensors = [Tensor(100, True), Tensor(7, False), Tensor(70, True), Tensor(30, True, expert=True)]
    buffer = make_buffer(tensors, expert=False, ranks=3, sharded=True, bucket_size=None)
    (bucket,) = buffer.buckets
    assert bucket.params == ((0, 70), (128, 228))
    assert buffer.elements == 384 and buffer.shard_elements == 128
    assert [buffer.owned_elements(rank) for rank in range(3)] == [70, 100, 0]
    whole = make_buffer(tensors, expert=False, ranks=3, sharded=False, bucket_size=None)
    assert whole.elements == 170 and whole.owned_elements(2) == 170
    assert make_buffer(tensors, expert=True, ranks=3, sharded=True, bucket_size=None).elements == 384


def test_buckets_are_closed_when_full_and_around_tied_embeddings():
    tensors = [Tensor(128, True, shared_embedding=True), *[Tensor(128, True)] * 4]
    buffer = make_buffer(tensors, expert=False, ranks=2, sharded=True, bucket_size=200)
    assert [(b.start, b.end) for b in buffer.buckets] == [(0, 256), (256, 512), (512, 640)]


def test_shards_of_all_ranks_are_all_parameters():
    shape = model_shape(MOE)
    run = settings(expert_model_parallel_size=8, tensor_model_parallel_size=2, sequence_parallel=True)
    groups = groups_of(run, 16)
    for buffer in memory.stage_buffers(stage_chunks(shape, run, 0), run, groups, 0):
        filled = sum(end - start for bucket in buffer.buckets for start, end in bucket.params)
        assert sum(buffer.owned_elements(rank) for rank in range(buffer.ranks)) == filled > 0


def test_kept_shards_are_as_many_as_a_probe_keeps():
    """Held against a run's own shards by tests/distributed/test_plan_memory.py."""
    copies = {
        ("trace", "empty"): (3, 4),
        ("trace", "empty", "short"): (5, 6),
        ("trace", "empty", "expert"): (4, 4),
    }
    for streams, (plain, router) in copies.items():
        run = settings(bvpo_streams=streams)
        assert memory.kept_copies(run, experts=True) == plain
        assert memory.kept_copies(dataclasses.replace(run, moe_aux_loss_coeff=(0.01,)), experts=True) == router


# ---- memory


def test_a_micro_batch_holds_every_streams_sequences():
    """Shortened traces and demonstrations are taken to be as long as traces; a demonstration is one sequence."""
    run, lengths = settings(micro_batch_size=1, max_length=1000), Lengths(1000, 100)
    assert micro_batch(run, lengths).tokens == 2 * 1000 + 2 * 100
    four = dataclasses.replace(run, bvpo_streams=("trace", "empty", "short", "expert"))
    assert micro_batch(four, lengths).tokens == 2 * 1000 + 2 * 100 + 2 * 1000 + 1000 and four.sequences == 7
    alone = dataclasses.replace(run, bvpo_streams=("expert",))
    assert micro_batch(alone, lengths).tokens == 1000 and not alone.uses_reference and not alone.probes


def test_what_makes_memory_smaller():
    shape, cluster = model_shape(MOE), Cluster(1, 8)

    def size(**values):
        run = settings(**{"expert_model_parallel_size": 8, "global_batch_size": 16, **values})
        return fullest(shape, run, cluster.ranks, Lengths.of(run))

    base = size()
    assert size(recompute_granularity="none") > base
    each = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert size(**each) < base
    assert size(tensor_model_parallel_size=2, sequence_parallel=True) < base
    assert size(context_parallel_size=2) < base
    assert size(bvpo_alpha="0.5") < base  # no copies for probes
    assert size(bvpo_alpha="1") < size(bvpo_alpha="0.5")  # no second stream
    assert size(lora_rank=64) > base
    assert size(tuner_type="full") > size(tuner_type="full", **OFFLOADED) > base


def test_the_longest_trace_fits_and_no_longer_one():
    shape, cluster = model_shape(MOE), Cluster(1, 8)
    run = settings(expert_model_parallel_size=8, global_batch_size=16)
    lengths = Lengths.of(run)
    longest = longest_trace(shape, run, cluster, lengths)

    def size(n):
        longer = dataclasses.replace(run, max_length=n)
        return fullest(shape, longer, 8, Lengths(n, lengths.empty)) / memory.GIB

    assert longest % 64 == 0 and size(longest) <= 80 < size(longest + 64)


def test_the_fullest_stage_is_among_those_that_the_search_looks_at():
    sizes = dict(pipeline_model_parallel_size=8, tensor_model_parallel_size=4, expert_model_parallel_size=4)
    uneven = dict(decoder_first_pipeline_num_layers=11, decoder_last_pipeline_num_layers=11)
    shape = model_shape(LARGE)
    run = settings(**sizes, **uneven, sequence_parallel=True, global_batch_size=64)
    lengths = Lengths.of(run)
    assert fullest(shape, run, 32, lengths) == max(s.total for s in all_stages(shape, run, 32, lengths))


def test_micro_batches_in_flight():
    run = settings(pipeline_model_parallel_size=4)
    assert [chunks_in_flight(run, pp=4, stage=s, micro_batches=8) for s in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(run, pp=4, stage=0, micro_batches=2) == 2
    virtual = settings(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    assert [chunks_in_flight(virtual, pp=4, stage=s, micro_batches=8) for s in range(4)] == [11, 9, 7, 5]


def test_a_micro_batch_has_both_streams():
    run = settings(max_length=1000, micro_batch_size=2)
    assert micro_batch(run, Lengths(1000, 100)) == Batch(2 * 2200, 2 * (2 * 1000**2 + 2 * 100**2))
    padded = dataclasses.replace(run, padding_free=False)
    assert micro_batch(padded, Lengths(1000, 100)).tokens == 8000
    packed = dataclasses.replace(run, packing=True, packing_length=5000)
    assert micro_batch(packed, Lengths(1000, 100)).tokens == 10000
    # A row of four sequences is longer than a pack of max_length tokens, and a pack of its own.
    default = dataclasses.replace(run, packing=True, packing_length=None)
    assert micro_batch(default, Lengths(1000, 100)).tokens == 2 * 2200
    trace_only = dataclasses.replace(run, bvpo_alpha="1")
    assert micro_batch(trace_only, Lengths(1000, 100)).tokens == 4000


@pytest.mark.parametrize(("trace", "shorter_than_a_row"), [(1024, False), (32768, True)])
def test_the_longest_pack_fits_and_no_longer_one(trace, shorter_than_a_row):
    shape, cluster = model_shape(MOE), Cluster(1, 8)
    run = settings(expert_model_parallel_size=8, global_batch_size=16, packing=True, max_length=trace)
    lengths = Lengths.of(run)
    longest = longest_trace(shape, run, cluster, lengths)

    def size(n):
        packed = dataclasses.replace(run, packing_length=n)
        return fullest(shape, packed, 8, Lengths(1, 1)) / memory.GIB

    assert longest % 64 == 0 and size(longest) <= 80 < size(longest + 64)
    assert (longest < micro_batch(run, lengths).tokens) == shorter_than_a_row


def test_an_offloaded_optimizer_by_hand():
    """Megatron keeps parameter, two moments and a pinned gradient on the host, each in float32: 16 bytes."""
    shape = model_shape("DeepSeek-R1-Distill-Qwen-1.5B")
    run = settings_from({**FULL, **OFFLOADED, "exp_avg_dtype": "bf16"})
    assert memory.host_bytes(shape, run, 1) == 16 * shape.total_parameters
    half = dataclasses.replace(run, optimizer_offload_fraction=0.5)
    assert memory.host_bytes(shape, half, 1) == 8 * shape.total_parameters
    assert memory.host_bytes(shape, settings_from(FULL), 1) == 0


def test_flash_attention_keeps_nothing_quadratic():
    shape, run = model_shape(DENSE), settings(recompute_granularity="none")
    short = micro_batch_activations(shape, run, Batch(8192, 8 * 1024**2), layers=36)
    long = micro_batch_activations(shape, run, Batch(8192, 8192**2), layers=36)
    assert short == long


def test_a_recomputed_layer_keeps_its_input():
    """By hand: 48 layers of 1,000 tokens of 2,048 elements in bf16, and what the head keeps of each token."""
    shape = model_shape(MOE)
    run = settings(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    saved, again = memory.saved_activations(shape, run, 1, 0, Batch(1000, 0))
    head = 1000 * (2048 * 2 + 4 + 2048 * 2 + 25)
    assert saved == 48 * 1000 * 2048 * 2 + head
    assert again > 1000 * 2048 * 2


def test_a_layer_of_transformer_engine_by_hand():
    """Dense, LoRA on all linear layers, flash attention, bf16: bytes of one token, tensor by tensor."""
    shape = model_shape(DENSE)
    h, q, kv, d, f, r = 4096, 4096, 1024, 128, 12288, 16
    attention = 2 * h + 4 + 2 * h + 2 * r  # the norm's input, what linear_qkv and its A read, what its B reads
    attention += 2 * q + 4 * 32 + 2 * kv + 4 * 8  # norms per head
    attention += 4 * 2 * d  # cosine and sine, for queries and keys
    attention += 2 * (q + kv + (q + 2 * kv)) + 4 * 32  # queries, keys, linear_qkv's product for the values, one a row
    attention += 2 * q + 2 * r  # attention's output is linear_proj's input
    mlp = 2 * h + 4 + 2 * h + 2 * r + 2 * 2 * f + 2 * f + 2 * r
    found = micro_batch_activations(shape, settings(recompute_granularity="none"), Batch(10, 100), layers=1)
    assert found.layer == 10 * (attention + mlp)


# ---- arithmetic


def test_flops_of_full_tuning_are_the_text_books():
    """6 N D for a forward and a backward pass, 2 N D for the reference; attention and the head's products apart."""
    shape = model_shape(DENSE)
    run = settings_from({**FULL, "recompute_granularity": "none", "bvpo_alpha": "1"})
    tokens = 1000.0
    n = shape.active_matrices + shape.vocab * shape.hidden
    found = micro_batch_flops(shape, run, Batch(tokens, 0))
    assert found == pytest.approx(8 * n * tokens + 2 * shape.vocab * shape.hidden * tokens)
    cached = dataclasses.replace(run, bvpo_ref_cache="/refs")
    assert found - micro_batch_flops(shape, cached, Batch(tokens, 0)) == pytest.approx(2 * n * tokens)
    kto = dataclasses.replace(run, loss_type="kto")
    assert micro_batch_flops(shape, kto, Batch(tokens, 0)) - found == pytest.approx(4 * n * tokens)
    zero = dataclasses.replace(run, loss_type="apo_zero_unpaired", max_length=1000)
    assert (
        micro_batch(zero, Lengths.of(zero)).tokens
        == micro_batch(dataclasses.replace(zero, loss_type=None), Lengths.of(zero)).tokens / 2
    )
    assert micro_batch_flops(shape, zero, Batch(tokens, 0)) == found and zero.sequences == run.sequences / 2


def test_the_bubble_and_what_crosses_nodes():
    shape = model_shape(MOE)
    run = settings(pipeline_model_parallel_size=2, expert_model_parallel_size=8, global_batch_size=32)
    costs = step_costs(shape, run, Cluster(2, 8), Lengths.of(run))
    assert costs.micro_batches == 4 and costs.bubble == pytest.approx(1 / 5)
    crossing = {t.kind: t.between_nodes for t in costs.traffic}
    assert crossing == {"expert parallel": False, "pipeline": True, "data parallel": False}
    wide = step_costs(shape, settings(expert_model_parallel_size=16), Cluster(2, 8), Lengths.of(run))
    assert {t.kind: t.between_nodes for t in wide.traffic}["expert parallel"]
    assert 0 < costs.seconds[0] < costs.seconds[1]


def test_suggestions_fit_and_are_ranked():
    shape, cluster = model_shape(MOE), Cluster(1, 8)
    run = settings(global_batch_size=32)
    table = suggestions(shape, run, cluster, Lengths.of(run))
    assert len(table) == 10 and all(s.fits for s in table)
    assert [s.middle_seconds for s in table] == sorted(s.middle_seconds for s in table)
    for s in table:
        check_with_neighbours(s.run, shape, cluster)
        assert s.bytes <= 0.9 * 80 * memory.GIB and s.longest >= 4096
    none = suggestions(model_shape(LARGE), run, Cluster(1, 4), Lengths.of(run))
    assert none and not any(s.fits for s in none)


def test_suggestions_allow_for_uneven_experts():
    shape, cluster = model_shape(MOE), Cluster(1, 8)
    run = settings(global_batch_size=32)
    even = suggestions(shape, run, cluster, Lengths.of(run), 1)[0]
    uneven = suggestions(shape, run, cluster, Lengths.of(run), 1, imbalance=4.0)[0]
    again = fullest(shape, uneven.run, 8, Lengths.of(run), 4.0)
    assert uneven.bytes == again <= 72 * memory.GIB < fullest(shape, even.run, 8, Lengths.of(run), 4.0)


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
    from megatron_bvpo.planning.command import make_plan

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
