"""Every rank of a large job, one after the other in one process: Megatron's own groups, model and gradient buffers.

    python -m tests.unit.sized_ranks '{"ranks": 32, "tp": 4, "ep": 8}' ...

For each layout it writes a line of JSON: how often the ranks together count each element of the model. Torch's
"fake" process groups have the right members and sizes and communicate nothing, which is all that building a model
and cutting its gradients need. Before the gradients are cut, each element of each weight is set to its number in
the **whole** model, from the checkpoint's record of what a rank holds, so that a slice tells what it is a part of.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field

from megatron_bvpo.rehearsal import install

if __name__ == "__main__":
    install()

import torch
import torch.distributed as dist

# What the passes' gradients are, in units of each element's number, and the Gram matrices' triangles that follow:
# the halves lie 2, 8 and 4 apart and the means are 2, 4 and 0; a quarter of the products, and the gaps 2 and −2.
MULTIPLES = {
    ("trace", "A"): 1,
    ("trace", "B"): 3,
    ("empty", "A"): 0,
    ("empty", "B"): 8,
    ("short", "A"): 2,
    ("short", "B"): -2,
}
GRAMS = (1, 4, -2, 16, -8, 4, 4, -4, 4)


@dataclass
class Numbers:
    """The whole model's elements, numbered from 1 in the order in which the ranks show them."""

    first: dict[str, int] = field(default_factory=dict)
    total: int = 1

    def of(self, entry) -> torch.Tensor:
        """Numbers of the elements of a ShardedTensor, shaped like its local part."""
        shape = entry.global_shape
        if entry.key not in self.first:
            self.first[entry.key] = self.total
            self.total += math.prod(shape)
        sizes = [1] * (len(shape) - entry.data.dim()) + list(entry.data.shape)
        number = torch.zeros(sizes, dtype=torch.float64)
        stride = 1
        for axis in reversed(range(len(shape))):
            place = entry.global_offset[axis] + torch.arange(sizes[axis], dtype=torch.float64)
            number += stride * place.view([-1 if a == axis else 1 for a in range(len(shape))])
            stride *= shape[axis]
        return (self.first[entry.key] + number).view(entry.data.shape)


def start_rank(rank: int, layout: dict) -> None:
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=layout["ranks"], store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        context_parallel_size=layout.get("cp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=layout.get("etp", 1),
        num_distributed_optimizer_instances=layout.get("instances", 1),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def stop_rank() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_model(layout: dict):
    """This rank's part of a tiny GPT with Megatron's own layers."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp, experts = layout.get("tp", 1), 0 if layout.get("dense") else 8
    config = TransformerConfig(
        num_layers=layout.get("pp", 1) * (1 if layout.get("dense") else 2),
        hidden_size=16,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=2,
        ffn_hidden_size=16,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=layout.get("pp", 1),
        context_parallel_size=layout.get("cp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=layout.get("etp", 1),
        sequence_parallel=tp > 1,
        pipeline_dtype=torch.float32,
        num_moe_experts=experts or None,
        moe_ffn_hidden_size=8 if experts else None,
        moe_grouped_gemm=bool(experts),
        moe_token_dispatcher_type="alltoall",
        # As ms-swift has it: then Megatron leaves tensor-parallel marks out.
        perform_initialization=False,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=True),
        vocab_size=32,
        max_sequence_length=8,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=bool(layout.get("dense")),
        position_embedding_type="rope",
    )
    if layout.get("lora"):
        add_lora(model)
    return model


def add_lora(model) -> None:
    """Adapters in place, by the classes that ms-swift trains with: attention, experts and router."""
    import mcore_bridge.tuners  # noqa: F401  teaches peft Megatron's layers
    from peft import LoraConfig, get_peft_model

    for name, module in model.named_modules():
        if ".local_experts." in name or name.endswith(("experts.linear_fc1", "experts.linear_fc2")):
            module.is_expert = True  # as mcore-bridge marks them after it has built a model
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router"]
    get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets))


def number_weights(model, numbers: Numbers) -> None:
    """Each element of each trained weight becomes its number in the whole model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    memory = {param.untyped_storage().data_ptr() for param in trained.values()}
    state = model.sharded_state_dict()
    apply_factories(state)

    def visit(value) -> None:
        if isinstance(value, ShardedTensor):
            if value.data.untyped_storage().data_ptr() in memory:
                value.data.copy_(numbers.of(value))
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    with torch.no_grad():
        for param in trained.values():
            param.fill_(math.nan)
        visit(state)
    unknown = [name for name, param in trained.items() if torch.isnan(param).any()]
    assert not unknown, f"the checkpoint's record does not reach {unknown}"


def slices_of_rank(model, layout: dict, fault: str):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_bvpo.gradients import shards
    from megatron_bvpo.gradients.groups import ParallelGroups
    from megatron_bvpo.host.parallel_attributes import mend_parallel_attributes

    groups = ParallelGroups.current()
    if fault != "marks as they come":
        mend_parallel_attributes(model, groups)
    if fault == "experts reduced as dense":
        for param in model.parameters():
            param.allreduce = True
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.get("shards", True),
        grad_reduce_in_fp32=True,
        num_distributed_optimizer_instances=layout.get("instances", 1),
    )
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    for param in model.parameters():
        if param.requires_grad:
            param.main_grad.copy_(param.data)
    tp_rank = 0 if fault == "replicas counted on every rank" else groups.tp_rank
    found = shards.gradient_slices([wrapped], tp_rank=tp_rank)
    if fault == "copies not divided":
        found = [shards.Slice(s.grad_E, s.counted, 1) for s in found]
    if fault == "whole buffers":  # what a rank holds before the reduce-scatter, not after
        buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        found = [shards.Slice(b.grad_data, ((0, b.grad_data.numel()),), 1) for b in buffers]
    return found


def count(layout: dict, fault: str = "") -> dict:
    """{how often counted: elements} over all ranks, and the sums that `measure_grams` would reduce."""
    numbers, found, measured = Numbers(), Counter(), [0.0] * len(GRAMS)
    for rank in range(layout["ranks"]):
        start_rank(rank, layout)
        model = build_model(layout)
        number_weights(model, numbers)
        slices = slices_of_rank(model, layout, fault)
        for s in slices:
            for start, end in s.counted:
                for number in s.grad_E[start:end].tolist():
                    found[int(number)] += 1 / s.copies
        measured = [a + b for a, b in zip(measured, local_grams(slices), strict=True)]
        stop_rank()
    missing = numbers.total - 1 - len([n for n in found if n > 0])
    times = Counter(round(c, 9) for n, c in found.items() if n > 0)
    if missing:
        times[0] += missing
    squares = sum(float(n) ** 2 for n in range(1, numbers.total))
    return {"times": dict(times), "elements": numbers.total - 1, "measured": measured, "squares": squares}


def local_grams(slices) -> list[float]:
    """This rank's share of C and D (a fake all-reduce adds nothing), where both halves hold multiples of each
    element's number n; all are multiples of Σn² (GRAMS)."""
    from megatron_bvpo.gradients.moments import StreamCounts, measure_grams

    number = [s.grad_E.double() for s in slices]
    gradients = {key: [factor * g for g in number] for key, factor in MULTIPLES.items()}
    even, names = (2.0, 2.0), ("trace", "empty", "short")
    counts = StreamCounts(dict.fromkeys(names, even), dict.fromkeys(itertools.combinations(names, 2), even))
    C, D = measure_grams(slices, gradients, counts, "cpu", dist.group.WORLD).triangles()
    return [*C, *D]


if __name__ == "__main__":
    for text in sys.argv[1:]:
        given = json.loads(text)
        print("RESULT " + json.dumps(count(given, given.pop("fault", ""))), flush=True)
