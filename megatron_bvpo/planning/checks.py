"""Values that a run, or a plan of it, cannot work with: out of range, of no known kind, or refused by BVPO."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.combinations import check_optimizer, check_recomputation
from megatron_bvpo.launching.refusals import refusals
from megatron_bvpo.launching.stream_flags import read_streams
from megatron_bvpo.launching.unread_flags import refuse_unread
from megatron_bvpo.launching.value_rules import check_values

if TYPE_CHECKING:
    from megatron_bvpo.planning.settings import RunSettings

# What ms-swift's parser takes.
CHOICES = {
    "tuner_type": ("lora", "full", "lora_llm"),
    "rlhf_type": ("dpo", "kto", "grpo", "gkd", "rm", "bvpo"),
    "recompute_granularity": ("selective", "full", "none"),
    "recompute_method": ("uniform", "block"),
    "optimizer": ("adam", "sgd", "muon", "dist_muon"),
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
    "exp_avg_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "exp_avg_sq_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "ddp_backend": ("nccl", "gloo"),
    "bvpo_logp_impl": ("auto", "fused", "triton", "te", "torch"),
}
FLASH = re.compile(r"flash(_[234])?|fused|auto")

ROUTER_WEIGHT = "decoder.layers.0.mlp.router.weight"
OTHER_WEIGHTS = (
    "embedding.word_embeddings.weight decoder.layers.0.self_attention.linear_qkv.weight decoder.layers.0.mlp.experts."
    "linear_fc1.weight0 decoder.layers.0.mlp.linear_fc2.weight output_layer.weight"
)


def check_settings(settings: RunSettings, file: str | None = None) -> None:
    """Ranges, choices and combinations; raises UserError naming the key."""
    try:
        for check in (check_values, check_choices, _tuner, check_recomputation, _attention, _optimizer, _frozen):
            check(settings)
        read_streams(settings.bvpo_streams, settings.bvpo_weights, settings.bvpo_alpha)
    except UserError as e:
        raise of_key(e, file) from None


def check_run(settings: RunSettings, file: str | None = None) -> None:
    """What the run itself refuses, after its nodes were handed out; raises UserError naming the key."""
    if settings.rlhf_type != "bvpo":
        return
    for refused, flag, reason, remedy in refusals(settings):
        if refused:
            error = UserError(f"is {getattr(settings, flag)!r}: {reason}", field=flag, remedy=remedy)
            raise of_key(error, file)


def check_unread(values: Mapping[str, Any], settings: RunSettings, file: str | None = None) -> None:
    """Keys that the run would ignore, and refuses for that; raises UserError naming the key."""
    if settings.rlhf_type != "bvpo":
        return
    try:
        refuse_unread(values)
    except UserError as e:
        raise of_key(e, file) from None


def of_key(e: UserError, file: str | None = None) -> UserError:
    """The same error of a YAML file, which has keys where a command line has flags."""
    remedy = e.remedy and re.sub(r"--(?=\w)", "", e.remedy).replace("the flag", "the key")
    return UserError(e.message, file=file, line=e.line, field=(e.field or "").removeprefix("--"), remedy=remedy)


def check_choices(s: RunSettings) -> None:
    """What ms-swift's parser refuses; raises UserError naming the key."""
    for key, allowed in CHOICES.items():
        value = getattr(s, key)
        if value is not None and value not in allowed:
            raise UserError(f"is {value!r}; expected one of {', '.join(allowed)}", field=key)


def _tuner(s: RunSettings) -> None:
    if s.tuner_type not in ("lora", "full"):
        raise UserError(f"is {s.tuner_type!r}; the plan knows lora and full", field="tuner_type")


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
    check_optimizer(s)


def _frozen(s: RunSettings) -> None:
    frozen = s.freeze_parameters_regex
    if not frozen:
        return
    router_alone = re.search(frozen, ROUTER_WEIGHT) and not re.search(frozen, OTHER_WEIGHTS)
    if not router_alone:
        raise UserError(
            f"is {frozen!r}; the plan knows a frozen router only",
            field="freeze_parameters_regex",
            remedy=r"plan without it, an upper bound, or freeze '.*\.router\.weight'",
        )
