"""Values that a run, or a plan of it, cannot work with: out of range, of no known kind, or refused by BVPO."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.refusals import parse_alpha, refusals
from megatron_bvpo.launching.unread_flags import refuse_unread

if TYPE_CHECKING:
    from megatron_bvpo.planning.settings import RunSettings

# Whole numbers of 1 or more, where they are given at all.
COUNTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "microbatch_group_size_per_vp_stage",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "micro_batch_size",
    "global_batch_size",
    "max_length",
    "packing_length",
    "lora_rank",
    "recompute_num_layers",
    "bvpo_probe_interval",
)
# (lowest, highest, whether the lowest itself is allowed)
RANGES = {
    "lora_dropout": (0, 1, True),
    "optimizer_offload_fraction": (0, 1, True),
    "bvpo_logp_memory": (0, 1024, False),
    "bvpo_alpha_prior": (0, 1, True),
    "bvpo_kappa": (0, 1, False),
    "bvpo_moment_decay": (0, 0.9999, True),
}
# What ms-swift's parser takes.
CHOICES = {
    "rlhf_type": ("dpo", "kto", "grpo", "gkd", "rm", "bvpo"),
    "recompute_granularity": ("selective", "full", "none"),
    "recompute_method": ("uniform", "block"),
    "optimizer": ("adam", "sgd", "muon", "dist_muon"),
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
    "exp_avg_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "exp_avg_sq_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "ddp_backend": ("nccl", "gloo"),
    "bvpo_logp_impl": ("auto", "triton", "te", "torch"),
}
# Megatron's own lists.
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
FLASH = re.compile(r"flash(_[234])?|fused|auto")

ROUTER_WEIGHT = "decoder.layers.0.mlp.router.weight"
OTHER_WEIGHTS = (
    "embedding.word_embeddings.weight decoder.layers.0.self_attention.linear_qkv.weight decoder.layers.0.mlp.experts."
    "linear_fc1.weight0 decoder.layers.0.mlp.linear_fc2.weight output_layer.weight"
)


def check_values(settings: RunSettings, file: str | None = None) -> None:
    """Ranges, choices and combinations; raises UserError naming the key."""
    try:
        for check in (_counts, _ranges, _choices, _recomputation, _attention, _optimizer, _frozen):
            check(settings)
        parse_alpha(settings.bvpo_alpha)
    except UserError as e:
        raise _of_key(e, file) from None


def check_run(settings: RunSettings, file: str | None = None) -> None:
    """What the run itself refuses, after its nodes were handed out; raises UserError naming the key."""
    if settings.rlhf_type != "bvpo":
        return
    for refused, flag, reason, remedy in refusals(settings):
        if refused:
            error = UserError(f"is {getattr(settings, flag)!r}: {reason}", field=flag, remedy=remedy)
            raise _of_key(error, file)


def check_unread(values: Mapping[str, Any], settings: RunSettings, file: str | None = None) -> None:
    """Keys that the run would ignore, and refuses for that; raises UserError naming the key."""
    if settings.rlhf_type != "bvpo":
        return
    try:
        refuse_unread(values)
    except UserError as e:
        raise _of_key(e, file) from None


def _of_key(e: UserError, file: str | None) -> UserError:
    """The same error of a YAML file, which has keys where a command line has flags."""
    remedy = e.remedy and re.sub(r"--(?=\w)", "", e.remedy).replace("the flag", "the key")
    return UserError(e.message, file=file, line=e.line, field=(e.field or "").removeprefix("--"), remedy=remedy)


def _counts(s: RunSettings) -> None:
    for key in COUNTS:
        value = getattr(s, key)
        if value is not None and value < 1:
            raise UserError(f"is {value}; expected 1 or more", field=key, remedy="leave the key out for its default")


def _ranges(s: RunSettings) -> None:
    for key, (low, high, closed) in RANGES.items():
        value = getattr(s, key)
        if not (low <= value <= high) or (value == low and not closed) or math.isnan(value):
            bracket = "[" if closed else "("
            raise UserError(
                f"is {value}; expected a number in {bracket}{low:g}, {high:g}]",
                field=key,
                remedy="leave the key out for its default",
            )


def _choices(s: RunSettings) -> None:
    for key, allowed in CHOICES.items():
        value = getattr(s, key)
        if value is not None and value not in allowed:
            raise UserError(f"is {value!r}; expected one of {', '.join(allowed)}", field=key)
    wrong = [name for name in s.recompute_modules if name not in RECOMPUTE_MODULES]
    if wrong:
        raise UserError(f"has {wrong[0]!r}; Megatron knows {', '.join(RECOMPUTE_MODULES)}", field="recompute_modules")
    if s.tuner_type not in ("lora", "full"):
        raise UserError(f"is {s.tuner_type!r}; the plan knows lora and full", field="tuner_type")


def _recomputation(s: RunSettings) -> None:
    """ms-swift's and Megatron's rules."""
    if s.recompute == "full":
        if s.recompute_method is None:
            raise UserError(
                f"is {s.recompute_method!r}; full recomputation needs uniform or block",
                field="recompute_method",
                remedy="add recompute_method: uniform and recompute_num_layers: 1",
            )
        if s.recompute_num_layers is None:
            raise UserError(
                "is missing; full recomputation needs it",
                field="recompute_num_layers",
                remedy="add recompute_num_layers: 1",
            )
    for key in ("recompute_method", "recompute_num_layers"):
        if s.recompute == "selective" and getattr(s, key) is not None:
            raise UserError(
                f"is {getattr(s, key)!r}, and Megatron takes none with selective recomputation",
                field=key,
                remedy="leave the key out, or set recompute_granularity: full",
            )


def _attention(s: RunSettings) -> None:
    if not FLASH.fullmatch(s.attention_backend):
        raise UserError(
            f"is {s.attention_backend!r}: not planned. ms-swift pads every sequence with unfused attention, and "
            "plain attention keeps matrices that grow with the square of the length",
            field="attention_backend",
            remedy="use flash (the default), fused or auto",
        )


def _optimizer(s: RunSettings) -> None:
    if s.optimizer_cpu_offload and not s.use_precision_aware_optimizer:
        raise UserError(
            "is True without use_precision_aware_optimizer: not planned. The float32 parameters then stay on the GPU "
            "beside their copies on the host",
            field="optimizer_cpu_offload",
            remedy="add use_precision_aware_optimizer: true",
        )
    if s.use_precision_aware_optimizer and not s.use_distributed_optimizer:
        raise UserError(
            "is True without the distributed optimizer, which Megatron refuses",
            field="use_precision_aware_optimizer",
            remedy="add use_distributed_optimizer: true",
        )
    if s.overlap_param_gather and not s.use_distributed_optimizer:
        raise UserError(
            "is True without the distributed optimizer, so there are no shards to gather",
            field="overlap_param_gather",
            remedy="leave the key out, or set use_distributed_optimizer: true",
        )


def _frozen(s: RunSettings) -> None:
    frozen = s.freeze_parameters_regex
    if not frozen:
        return
    try:
        router_alone = re.search(frozen, ROUTER_WEIGHT) and not re.search(frozen, OTHER_WEIGHTS)
    except re.error as e:
        raise UserError(f"{frozen!r} is no regular expression: {e}", field="freeze_parameters_regex") from None
    if not router_alone:
        raise UserError(
            f"is {frozen!r}; the plan knows a frozen router only",
            field="freeze_parameters_regex",
            remedy=r"plan without it, an upper bound, or freeze '.*\.router\.weight'",
        )
