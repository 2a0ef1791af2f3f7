"""Parameter attributes that tell Megatron how a gradient is reduced and counted, put right.

Megatron reads three attributes: `allreduce` (False: an expert's, reduced over the expert data-parallel
group), `sequence_parallel` (True: each tensor-parallel rank saw other tokens, so the gradients are summed
over TP), and `tensor_model_parallel` (True: each TP rank holds another shard, so all of them count in
the gradient norm). The stock stack sets some of them wrongly; each case is told where it is mended.
Everything here runs after the model is built and before DDP and the optimizer read the attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from megatron_bvpo.gradients.groups import ParallelGroups

_EXPERT = re.compile(r"(^|\.)experts\.")


def mend_parallel_attributes(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """Mend one unwrapped Megatron model (chunk) in place; it may carry LoRA adapters."""
    _reduce_replicated_experts(model, groups)
    _sum_router_lora_over_sequence_parallel(model, groups)
    _mark_true_shards(model, groups)


def _reduce_replicated_experts(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """Experts held by every TP rank must be reduced over TP.

    Megatron marks an expert's parameters only where EP > 1. With TP > 1, EP = 1 and expert TP = 1 the
    TP ranks hold copies, route other tokens through them, and never add their gradients: the copies
    drift apart. The expert data-parallel group does span those ranks, so the mark is all that is missing.
    """
    if groups.ep_size > 1 or groups.tp_size == groups.etp_size:
        return
    for name, param in model.named_parameters():
        if is_expert(name):
            param.allreduce = False


def _sum_router_lora_over_sequence_parallel(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """A router's LoRA factors see this TP rank's tokens only, as the router's own weight does.

    mcore-bridge marks the LoRA factors of every other layer, and leaves the router's out.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, TopKRouter) and groups.tp_size > 1 and base.config.sequence_parallel:
            for factors in (module.lora_A, module.lora_B):
                for param in factors.parameters():
                    param.sequence_parallel = True


def _mark_true_shards(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """Set `tensor_model_parallel` from the checkpoint's own record of which rank holds what.

    Transformer Engine marks the weight of every Linear, replicated ones (LoRA factors) too, and with
    `perform_initialization=False` (ms-swift's default) the embedding and the output layer are not marked
    at all: the first are counted once per TP rank in the norm, the others lose the shards of ranks > 0.
    """
    if groups.tp_rank == 0:
        return  # rank 0 counts everything it holds, whatever the attribute says
    record = tensor_parallel_shards(model)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param.data_ptr() not in record:
            raise RuntimeError(f"{name} is trained but no checkpoint would hold it; please report this model")
        param.tensor_model_parallel = record[param.data_ptr()]


def is_expert(name: str) -> bool:
    """Whether a parameter of this name is of an expert, and so has the experts' own replicas."""
    return bool(_EXPERT.search(name))


def tensor_parallel_shards(model: torch.nn.Module) -> dict[int, bool]:
    """By data pointer: True for a shard, False for a copy of what TP rank 0 holds. Not for use on TP rank 0.

    A checkpoint cannot be written without knowing replicas from shards: a replica's TP coordinate in
    `replica_id` is the TP rank, a shard's is 0.
    """
    record = {}
    for entry in _sharded_entries(model.sharded_state_dict()):
        replica = entry.replica_id
        record[entry.data.data_ptr()] = isinstance(replica, tuple) and len(replica) == 3 and replica[1] == 0
    return record


def _sharded_entries(state_dict) -> Iterator:
    """All ShardedTensor and ShardedTensorFactory entries of a sharded state dict that hold a tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in state_dict.values():
        if isinstance(value, dict):
            yield from _sharded_entries(value)
        elif isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.data is not None:
            yield value
