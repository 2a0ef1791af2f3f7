"""The names of the flags, known without loading ms-swift, and what a wrong one was probably meant to be.

flag_names.json has the fields of `BvpoArguments` and of the ms-swift 4.6 classes under it;
tests/unit/test_plan_settings.py compares it with their source.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

# What people bring along from ms-swift's other backend, from its version 3 and from Megatron-LM, and what the Megatron
# backend of ms-swift 4 calls it. A word behind the name says where more than the name differs.
OTHER_NAMES = {
    # the other backend
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size (rows a step, over all ranks)",
    "learning_rate": "lr",
    "max_steps": "train_iters",
    "max_grad_norm": "clip_grad",
    "lr_scheduler_type": "lr_decay_style",
    "warmup_ratio": "lr_warmup_fraction",
    "warmup_steps": "lr_warmup_iters",
    "adam_epsilon": "adam_eps",
    "optim": "optimizer",
    "router_aux_loss_coef": "moe_aux_loss_coeff",
    "gradient_checkpointing": "recompute_granularity",
    "deepspeed": "use_distributed_optimizer",
    "fsdp": "use_distributed_optimizer",
    "resume_from_checkpoint": "mcore_adapter (LoRA) or --mcore_model (full), with --finetune false",
    "save_only_model": "no_save_optim",
    "eval_strategy": "eval_steps",
    "simpo_gamma": "bvpo_simpo_gamma",
    # version 3 of ms-swift
    "train_type": "tuner_type",
    "max_epochs": "num_train_epochs",
    "save": "output_dir",
    "load": "mcore_model",
    "adapter_load": "mcore_adapter",
    "ref_load": "mcore_ref_model",
    "ref_adapter_load": "mcore_ref_adapter",
    "save_interval": "save_steps",
    "save_retain_interval": "save_total_limit",
    "eval_interval": "eval_steps",
    "log_interval": "logging_steps",
    "manual_gc_interval": "manual_gc_steps",
    "num_workers": "dataloader_num_workers",
    "seq_length": "max_length",
    "distributed_backend": "ddp_backend",
    "distributed_timeout_minutes": "ddp_timeout (seconds)",
    "load_safetensors": "model (its folder is read as it is)",
    "no_initialization": "perform_initialization (the opposite)",
    "no_data_sharding": "data_sharding (the opposite)",
    "no_masked_softmax_fusion": "masked_softmax_fusion (the opposite)",
    "no_bias_dropout_fusion": "bias_dropout_fusion (the opposite)",
    "no_bias_swiglu_fusion": "bias_activation_fusion (the opposite)",
    "no_rope_fusion": "apply_rope_fusion (the opposite)",
    "no_gradient_accumulation_fusion": "gradient_accumulation_fusion (the opposite)",
    "use_flash_attn": "attention_backend",
    "num_layers_per_virtual_pipeline_stage": "virtual_pipeline_model_parallel_size (chunks a rank)",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage",
    "gradient_checkpointing_kwargs": "recompute_granularity",
    "original_max_position_embeddings": "rope_scaling",
}
# Sizes that version 3 took as flags; now they come from the model's config.json.
MODEL_SIZES = frozenset(
    "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups "
    "max_position_embeddings position_embedding_type rotary_base rotary_percent normalization norm_epsilon swiglu "
    "untie_embeddings_and_output_weights disable_bias_linear add_qkv_bias kv_channels qk_layernorm num_experts "
    "moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk moe_router_pre_softmax "
    "moe_router_score_function multi_latent_attention q_lora_rank kv_lora_rank architectures padded_vocab_size".split()
)
# Keys of a YAML file that are no fields: environment variables, and the switch to this backend.
OTHER_KEYS = ("ENV", "megatron")


def flag_names() -> list[str]:
    """Names of all flags, sorted."""
    return json.loads((Path(__file__).parent / "flag_names.json").read_text())


def meant_by(name: str, names: Iterable[str]) -> str:
    """What an unknown flag was probably meant to be, as the rest of a sentence; empty where nothing is close."""
    names = list(names)
    if name in MODEL_SIZES:
        return "; sizes come from the model's config.json"
    known = OTHER_NAMES.get(name)
    if known is None:
        close = difflib.get_close_matches(name, [*names, *OTHER_NAMES], n=1, cutoff=0.7)
        if not close:
            return ""
        if close[0] in names:
            return f"; did you mean --{close[0]}?"
        known = OTHER_NAMES[close[0]]
    return f"; the Megatron backend's is --{known}"


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """A line for each key that is no flag's name, with the one that was probably meant."""
    names = flag_names()
    known = {*names, *OTHER_KEYS}
    return [
        f"{key}: no such key, so it changes nothing here and the run refuses it{meant_by(key, names).replace('--', '')}"
        for key in keys
        if key not in known
    ]
