"""Settings that a BVPO run refuses, for the run itself and for `bvpo plan`.

Nothing here loads torch or ms-swift: a plan answers on a login node in under a second.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.stream_flags import read_streams


def refusals(args: Any) -> list[tuple]:
    """(refused, flag, reason, remedy) of every setting under which BVPO would be wrong or was never shown right.

    Args:
        args: an object with ms-swift's argument names as attributes.
    """
    leave = "leave the flag out"
    found = [
        (
            args.use_megatron_fsdp,
            "use_megatron_fsdp",
            "Megatron-FSDP hides the finalised gradients that BVPO needs",
            "use the distributed optimizer (the default)",
        ),
        (
            "muon" in str(args.optimizer),
            "optimizer",
            "Muon's update is not linear in the gradient, so it is not an update with the mixed gradient",
            "use --optimizer adam",
        ),
        (
            args.moe_expert_capacity_factor is not None,
            "moe_expert_capacity_factor",
            "dropping tokens by capacity makes one stream's gradient depend on the other",
            leave,
        ),
        (
            args.async_save,
            "async_save",
            "a checkpoint is renamed into place when it is whole, and an asynchronous one is not whole yet",
            leave,
        ),
        (
            args.calculate_per_token_loss,
            "calculate_per_token_loss",
            "BVPO's losses are means over pairs, not over tokens",
            leave,
        ),
        (args.f_divergence_type != "reverse_kl", "f_divergence_type", "BVPO has the reverse KL only", leave),
        (args.task_type not in (None, "causal_lm"), "task_type", "BVPO trains causal language models", leave),
        (
            args.streaming and args.packing,
            "packing",
            "ms-swift packs streamed rows by one sequence each, and a preference row has several",
            "pack without --streaming, or stream without --packing (batches stay padding-free)",
        ),
        (
            (args.tuner_type == "full" or args.bvpo_new_layers_only)
            and (args.fp8_param_gather or args.fp4_param_gather),
            "fp8_param_gather",
            "which rank counts a parameter is not known for 8-bit parameters",
            leave,
        ),
        (
            args.loss_type == "kto" and args.global_batch_size == 1 and not args.packing,
            "global_batch_size",
            "kto compares with what the policy does on other rows' responses, and a batch of one row has no other",
            "raise it, or take --loss_type apo_zero_unpaired, which compares with nothing",
        ),
        (args.mtp_num_layers, "mtp_num_layers", "multi-token prediction would add its own loss", leave),
        (
            # Its kernel takes no map without a token (an assertion; then it gives too few rows back).
            args.moe_permute_fusion
            and args.moe_token_dispatcher_type == "allgather"
            and args.expert_model_parallel_size > 1,
            "moe_token_dispatcher_type",
            "with moe_permute_fusion Transformer Engine stops at an expert rank that got no token, as those of empty "
            "traces may",
            "leave the flag out (alltoall), or turn moe_permute_fusion off",
        ),
    ]
    found += silent_refusals(args) + (lora_refusals(args) if adapts(args) else full_refusals(args))
    found += counting_refusals(args)
    if args.optimizer_cpu_offload:
        found += offload_refusals(args)
    if read_streams(args.bvpo_streams, args.bvpo_weights, args.bvpo_alpha).measured:
        found += auto_refusals(args)
    return found


def adapts(args: Any) -> bool:
    """Whether the run trains adapters: it was asked to, or was given one, which turns ms-swift's full tuning off."""
    given = (args.adapters, args.ref_adapters, args.mcore_adapter, args.mcore_ref_adapter)
    return args.tuner_type != "full" or any(given)


def silent_refusals(args: Any) -> list[tuple]:
    """Settings of the stock stack that would train something else than was asked for, without a word."""
    leave = "leave the flag out"
    streams = read_streams(args.bvpo_streams, args.bvpo_weights, args.bvpo_alpha)
    no_reference = args.reference_free or args.loss_type == "simpo" or not streams.weights
    return [
        (
            args.cp_partition_mode != "zigzag",
            "cp_partition_mode",
            "megatron-core's attention knows zigzag parts only, so tokens would be credited to other sequences",
            "leave the flag out",
        ),
        (
            args.bridge_backend != "mcore-bridge",
            "bridge_backend",
            "heads, adapters, checkpoints and merges are known with mcore-bridge only",
            "leave the flag out",
        ),
        *(
            (no_reference and getattr(args, flag), flag, "this loss has no reference, so nothing would read it", leave)
            for flag in ("ref_model", "mcore_ref_model", "ref_adapters", "mcore_ref_adapter")
        ),
        (
            bool(args.new_special_tokens),
            "new_special_tokens",
            "their embeddings are drawn at the start: the reference of full tuning has zeros there, no adapter holds "
            "them, and pipeline stages that share them draw each its own",
            "add the tokens to the model first, and give that as --model",
        ),
    ]


def counting_refusals(args: Any) -> list[tuple]:
    """Settings under which other tokens would count than the responses', or nothing could learn."""
    leave = "leave the flag out"
    frozen = getattr(args, "freeze_parameters_ratio", 0.0)  # a plan refuses any value of it
    trained = getattr(args, "trainable_parameters", None) or getattr(args, "trainable_parameters_regex", None)
    return [
        (
            # ms-swift adds the second name for hybrid models.
            args.loss_scale not in (None, "last_round", "last_round+ignore_empty_think"),
            "loss_scale",
            "BVPO counts the two responses, each token once: no earlier turn, no prompt, no weights",
            leave,
        ),
        (
            args.truncation_strategy == "split",
            "truncation_strategy",
            "a piece of a response cannot be preferred to a piece of another",
            "use delete (the default), right or left; docs/rows.md says what they do to a pair",
        ),
        (
            args.tuner_type == "full" and frozen >= 1 and not trained,
            "freeze_parameters_ratio",
            "every parameter is frozen, so nothing would be trained",
            "lower it, or name what is trained in --trainable_parameters",
        ),
    ]


def lora_refusals(args: Any) -> list[tuple]:
    """Settings that a run with adapters would ignore, or under which its reference would move."""
    frozen = "adapters leave every base weight as it is, so nothing would read it"
    reference = "the reference of a run with adapters is the model without them, so nothing would read it"
    full_only = {
        "freeze_parameters": frozen,
        "freeze_parameters_regex": None if args.bvpo_new_layers_only else frozen,  # of the new layers, it is read
        "freeze_parameters_ratio": frozen,
        "trainable_parameters": frozen,
        "trainable_parameters_regex": frozen,
        "ref_model": reference,
        "mcore_ref_model": reference,
    }
    return [
        (
            args.tuner_type == "lora_llm",
            "tuner_type",
            "it trains the vision tower, which the reference shares",
            "use lora",
        ),
        (
            args.lora_bias != "none",
            "lora_bias",
            "biases of the base model would train, the reference shares them, and no adapter holds them",
            "leave the flag out",
        ),
        (
            args.lora_dtype is not None,
            "lora_dtype",
            "Megatron casts the factors to the model's type all the same; their float32 copies are the optimizer's",
            "leave the flag out",
        ),
        *((bool(why and getattr(args, flag)), flag, why, "leave the flag out") for flag, why in full_only.items()),
        *(refusals_beside_new_layers(args) if args.bvpo_new_layers_only else ()),
    ]


def refusals_beside_new_layers(args: Any) -> list[tuple]:
    """What does not go with adapters on the old layers of a grown model whose new layers are trained whole."""
    fresh = "the reference is the old model, and the adapters on it begin anew"
    refused = {
        "adapters": (fresh, "merge it into the old model (bvpo export --merge), and grow that"),
        "ref_adapters": (fresh, "leave the flag out"),
        "mcore_ref_adapter": (fresh, "leave the flag out"),
        "mcore_model": (
            "the reference is the given model without its new layers, known by its files in Hugging Face's form",
            "give these weights as --model in that form; a checkpoint to go on from is --mcore_adapter",
        ),
        "modules_to_save": (
            "whole modules beside whole layers and adapters were never shown right",
            "leave the flag out",
        ),
    }
    found = [(bool(getattr(args, flag)), flag, *why) for flag, why in refused.items()]
    found.append(
        (
            args.merge_lora is False and args.save_safetensors,
            "merge_lora",
            "adapters of the old layers without the new ones, which were trained, too, are no model that can be loaded",
            "leave the flag out; --save_safetensors false keeps Megatron's files alone, to go on from",
        )
    )
    return found


# What only adapters have, with the value that asks for nothing.
LORA_ONLY = {
    "target_modules": ("all-linear",),
    "target_regex": None,
    "modules_to_save": (),
    "lora_rank": 8,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "lora_bias": "none",
    "lora_dtype": None,
    "use_rslora": False,
}


def full_refusals(args: Any) -> list[tuple]:
    """Settings that full tuning, ms-swift's default, would ignore."""
    without = "the reference is the model without its new layers, so nothing would read it"
    found = [
        (bool(args.bvpo_new_layers_only and getattr(args, flag)), flag, without, "leave the flag out")
        for flag in ("ref_model", "mcore_ref_model")
    ]
    found.append(
        (
            bool(args.bvpo_new_layers_only and args.mcore_model and args.finetune),
            "mcore_model",
            "the reference is the given model without its new layers, and its cache and resumed runs know it by the "
            "files in Hugging Face's form",
            "give these weights as --model in that form, or add --finetune false to resume",
        )
    )
    for flag, default in LORA_ONLY.items():
        value = getattr(args, flag)
        value = tuple(value) if isinstance(value, list) else value
        found.append((value != default, flag, "without adapters nothing would read it", "add --tuner_type lora"))
    return found


def offload_refusals(args: Any) -> list[tuple]:
    """Settings under which megatron-core 0.16 cannot train or resume with Adam on the host, mostly without a word.

    All were seen with its own HybridDeviceOptimizer.
    """
    flag = "optimizer_cpu_offload"
    bf16 = args.bf16 or not (
        args.fp16 or str(args.torch_dtype).removeprefix("torch.") in ("float32", "fp32", "float16")
    )
    return [
        (not bf16, flag, "megatron-core takes a bf16 model only with the optimizer on the host", "train in bf16"),
        (
            not args.use_precision_aware_optimizer,
            flag,
            "the float32 parameters would stay on the GPU, too, and no checkpoint could be resumed",
            "add --use_precision_aware_optimizer true",
        ),
        (
            # Else it reads Adam's step from the new optimizer.
            not args.no_save_optim and not args.dist_ckpt_optim_fully_reshardable,
            flag,
            "its checkpoints forget Adam's step, so a resumed run would go on differently",
            "add --dist_ckpt_optim_fully_reshardable true",
        ),
        (
            # The step that was loaded is written back before every further one, but for the optimizers on the host.
            not args.no_save_optim and args.optimizer_offload_fraction != 1,
            "optimizer_offload_fraction",
            "the part on the GPU would count no steps after a resume",
            "leave the flag out, so that all is on the host",
        ),
    ]


def auto_refusals(args: Any) -> list[tuple]:
    """Settings under which the gradients' moments were never shown to be measured right."""
    fixed = "fix the weights (--bvpo_alpha NUMBER; --bvpo_weights NAME=NUMBER … of others), or leave the flag out"
    return [
        (args.fp16, "fp16", "the moments of gradients under a moving loss scale are not measured", fixed),
        (
            # ms-swift turns the name into torch's type later.
            str(args.main_grads_dtype) in ("bf16", "torch.bfloat16"),
            "main_grads_dtype",
            "differences of bf16 gradients are noise",
            fixed,
        ),
        (args.use_precision_aware_optimizer, "use_precision_aware_optimizer", "never tested with probes", fixed),
        (args.optimizer_cpu_offload, "optimizer_cpu_offload", "never tested with probes", fixed),
        (args.group_by_length, "group_by_length", "halves of a batch sorted by length are not alike", fixed),
    ]


def refuse_unsupported(args: Any) -> None:
    """Raise UserError for the first of `refusals`, whether its flag was given or `--megatron_extra_kwargs` sets it."""
    extra = args.megatron_extra_kwargs
    given = SimpleNamespace(**vars(args) | (extra if isinstance(extra, dict) else {}))
    for refused, flag, reason, remedy in refusals(given):
        if refused:
            raise UserError(f"{flag} is {getattr(given, flag)!r}: {reason}", field=f"--{flag}", remedy=remedy)
