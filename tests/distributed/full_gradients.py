"""Full gradients by Hugging Face name, gathered without any of the project's shard code.

mcore-bridge already knows how to gather a sharded model and give every tensor its Hugging Face name. So
the finalised gradients are put in the place of the parameters, exported, and the parameters put back.
"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist


def whole_main_grads(wrapped_models) -> dict[int, torch.Tensor]:
    """id(param) to its finalised gradient on this rank, shaped like the parameter.

    With the distributed optimizer a data-parallel rank holds one slice of each bucket after the
    reduce-scatter, so the slices are gathered first. The buffers themselves are left as they are.
    """
    grads: dict[int, torch.Tensor] = {}
    for model in wrapped_models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            whole = buffer.grad_data.clone()
            group = buffer.data_parallel_group
            n = dist.get_world_size(group)
            if buffer.ddp_config.use_distributed_optimizer and n > 1:
                for bucket in buffer.buckets:
                    start = bucket.offset
                    size = bucket.grad_data.numel()
                    shard = bucket.grad_data.view(n, -1)[dist.get_rank(group)].contiguous()
                    parts = [torch.empty_like(shard) for _ in range(n)]
                    dist.all_gather(parts, shard, group=group)
                    whole[start : start + size] = torch.cat(parts)
            for param, (start, end, _) in buffer.param_index_map.items():
                grads[id(param)] = whole[start:end].view(param.shape)
    return grads


def export_gradients(trainer) -> dict[str, torch.Tensor]:
    """Gradients of all trained parameters by Hugging Face (or peft) name, float64; on the master rank only."""
    grads = whole_main_grads(trainer.wrapped_models)
    lora = trainer.args.tuner_type == "lora"
    saved = []
    for model in trainer.unwrapped_models:
        for param in model.parameters():
            if id(param) in grads:
                saved.append((param, param.data))
                param.data = grads[id(param)].to(param.dtype)
    try:
        exported = {
            name: tensor.double().clone()
            for name, tensor in trainer.bridge.export_weights(
                list(trainer.unwrapped_models),
                target_device="cpu",
                only_master_rank=True,
                peft_format=lora,
                _is_saving=True,  # the path that gathers experts over a pipeline
            )
            if tensor is not None
        }
    finally:
        for param, data in saved:
            param.data = data
    dist.barrier()
    return exported


def shared_factor(name: str) -> str:
    """The name under which Megatron holds this tensor: q, k and v share one LoRA A, and so do gate and up."""
    if ".lora_A." not in name:
        return name
    return re.sub(r"\b[qkv]_proj\b", "q_proj", re.sub(r"\b(gate|up)_proj\b", "gate_proj", name))


def true_norm(gradients: dict[str, torch.Tensor]) -> float:
    """Norm over each tensor that exists, once."""
    once = [g for name, g in gradients.items() if shared_factor(name) == name]
    return torch.stack([g.square().sum() for g in once]).sum().sqrt().item()
