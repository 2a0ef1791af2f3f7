"""What `bvpo plan` works out: buffers, memory, arithmetic. tests/distributed/test_plan_memory.py has tensors."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_bvpo.planning import memory
from megatron_bvpo.planning.activations import Batch, chunks_in_flight, micro_batch_activations
from megatron_bvpo.planning.buffers import make_buffer
from megatron_bvpo.planning.costs import micro_batch_flops, step_costs
from megatron_bvpo.planning.layout import Cluster, check_with_neighbours, groups_of
from megatron_bvpo.planning.memory import Lengths, all_stages, fullest, longest_trace, micro_batch, stage_chunks
from megatron_bvpo.planning.model_shapes import model_shape
from megatron_bvpo.planning.reading import settings_from
from megatron_bvpo.planning.suggest import suggestions
from megatron_bvpo.planning.tensors import Tensor
from tests.unit.planned_runs import DENSE, FULL, LARGE, MOE, OFFLOADED, settings

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
