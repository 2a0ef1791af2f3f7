"""Divisibility rules of a parallel layout, checked before any process group is made."""

from __future__ import annotations

from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.value_rules import check_counts


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _require(ok: bool, problem: str, flag: str, remedy: str) -> None:
    if not ok:
        raise UserError(problem, field=f"--{flag}", remedy=remedy)


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "micro_batch_size",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


def check_layout(args: Any, world_size: int) -> None:
    """Rules between the layout and the number of ranks; `args` has ms-swift's field names."""
    check_counts(args, SIZES)  # below 1 they would end in a division by zero, or in an assertion on every rank
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    block = tp * pp * cp
    _require(
        world_size % block == 0,
        f"{world_size} ranks cannot be split into TP {tp} × PP {pp} × CP {cp} = {block}",
        "tensor_model_parallel_size",
        f"start a multiple of {block} ranks (NPROC_PER_NODE × NNODES), or lower TP, PP or CP",
    )
    expert_block = etp * ep * pp
    _require(
        world_size % expert_block == 0,
        f"{world_size} ranks cannot be split into expert TP {etp} × EP {ep} × PP {pp} = {expert_block}",
        "expert_model_parallel_size",
        f"EP can be {_some(divisors(max(world_size // (etp * pp), 1)))} here",
    )
    dp = world_size // block
    per_step = args.micro_batch_size * dp
    _require(
        args.global_batch_size % per_step == 0 and args.global_batch_size > 0,
        f"global batch {args.global_batch_size} is not a multiple of micro batch {args.micro_batch_size} × "
        f"data parallel {dp} = {per_step}",
        "global_batch_size",
        f"use {max(args.global_batch_size // per_step, 1) * per_step}",
    )
    vpp = args.virtual_pipeline_model_parallel_size
    if vpp and vpp > 1:
        _require(
            pp > 1,
            f"virtual pipelining with {vpp} chunks a rank needs a pipeline, and PP is {pp}",
            "virtual_pipeline_model_parallel_size",
            "leave the flag out, or raise PP to 2 or more",
        )
        n = args.global_batch_size // per_step
        _require(
            n >= pp and n % pp == 0,
            f"{n} micro-batches a step cannot fill {pp} pipeline stages with virtual pipelining",
            "global_batch_size",
            f"use a multiple of {per_step * pp}",
        )


def check_model_fits(args: Any, hf_config: Any) -> None:
    """Rules between the layout and the model's sizes, from its Hugging Face config."""
    config = getattr(hf_config, "text_config", None) or hf_config
    tp, pp, ep = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.expert_model_parallel_size,
    )
    heads = getattr(config, "num_attention_heads", None)
    if heads:
        _require(
            heads % tp == 0,
            f"{heads} attention heads cannot be split over TP {tp}",
            "tensor_model_parallel_size",
            f"TP can be {_some(divisors(heads))}",
        )
        groups = getattr(config, "num_key_value_heads", None) or heads
        _require(
            groups % tp == 0 or tp % groups == 0,
            f"{groups} key/value heads do not fit TP {tp}",
            "tensor_model_parallel_size",
            f"TP can be {_some(divisors(groups))}",
        )
    layers = getattr(config, "num_hidden_layers", None)
    custom_split = (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
    )
    if layers and not custom_split:
        chunks = pp * (args.virtual_pipeline_model_parallel_size or 1)
        _require(
            layers % chunks == 0,
            f"{layers} layers cannot be split evenly over {chunks} pipeline chunks (PP {pp})",
            "pipeline_model_parallel_size",
            f"PP can be {_some(divisors(layers))}, or give --decoder_first_pipeline_num_layers and "
            "--decoder_last_pipeline_num_layers",
        )
    experts = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    if experts:
        _require(
            experts % ep == 0,
            f"{experts} experts cannot be split over EP {ep}",
            "expert_model_parallel_size",
            f"EP can be {_some(divisors(experts))}",
        )
        _require(
            tp == 1 or args.sequence_parallel,
            f"a mixture of experts with TP {tp} needs sequence parallelism",
            "sequence_parallel",
            "add --sequence_parallel true",
        )
    else:
        _require(
            ep == 1,
            f"the model has no experts, so EP {ep} has nothing to split",
            "expert_model_parallel_size",
            "use EP 1",
        )
    _require(
        not (args.tuner_type != "full" and args.expert_tensor_parallel_size > 1),
        f"LoRA on experts does not work with expert TP {args.expert_tensor_parallel_size}",
        "expert_tensor_parallel_size",
        "use --expert_tensor_parallel_size 1 and a larger EP",
    )
