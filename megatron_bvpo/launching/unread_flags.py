"""Flags that ms-swift's parser takes and that a BVPO run would ignore: asking for one is told, not passed over.

Name and default of each, by the reason; tests/unit/test_unread_flags.py compares the names with what ms-swift's and
megatron-core's sources read, and the defaults with the arguments' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.argv import FALSE, TRUE, option_list, option_values

UNREAD: dict[str, dict[str, Any]] = {
    "nothing in ms-swift 4.6 or megatron-core 0.16 reads it": {
        "sequence_packing_scheduler": None,
        "optimizer_cuda_graph": False,
        "apply_dsa_kernel_fusion": False,
        "csa_dense_mode": False,
        "mhc_recompute_layer_num": None,
        "create_checkpoint_symlink": False,
        "enable_npu_model_patch": True,
        "use_swift_lora": False,
    },
    "it belongs to GRPO, GKD, KTO or reward models": {
        "calculate_KL": None,
        "center_rewards_coefficient": None,
        "teacher_model": None,
        "teacher_model_type": None,
        "teacher_model_revision": None,
        "_teacher_use_disable_adapter": False,
        "teacher_model_server": None,
        "teacher_tag_key": "dataset",
        "gkd_logits_topk": None,
        "lmbda": 0.5,
        "seq_kd": False,
        "offload_teacher_model": False,
        "sft_alpha": 0.0,
        "teacher_kl_coef": 1.0,
        "temperature": 0.9,
        "generation_batch_size": None,
        "steps_per_generation": None,
        "num_generations": 8,
        "num_generations_eval": None,
        "max_completion_length": 512,
        "importance_sampling_level": "token",
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "real_tau": 0.5,
        "fipo_decay_rate": 32.0,
        "fipo_clip_range": 0.2,
        "fipo_clip_high_only": True,
        "fipo_safety_threshold": 4.0,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "top_k": -1,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "use_ray": False,
        "vllm_mode": None,
        "vllm_enable_prefix_caching": True,
        "vllm_gpu_memory_utilization": 0.9,
        "vllm_tensor_parallel_size": 1,
        "vllm_max_model_len": None,
        "vllm_enforce_eager": False,
        "vllm_limit_mm_per_prompt": None,
        "vllm_disable_cascade_attn": False,
        "vllm_max_num_seqs": None,
        "vllm_mm_processor_cache_gb": None,
        "vllm_engine_kwargs": None,
        "vllm_enable_lora": False,
        "sleep_level": 0,
        "offload_optimizer": False,
        "offload_model": False,
        "offload_bridge": False,
        "vllm_server_base_url": None,
        "vllm_server_host": None,
        "vllm_server_port": [8000],
        "vllm_server_timeout": 240.0,
        "vllm_server_group_port": None,
        "reward_funcs": [],
        "reward_weights": None,
        "cosine_min_len_value_wrong": -0.5,
        "cosine_max_len_value_wrong": 0.0,
        "cosine_min_len_value_correct": 1.0,
        "cosine_max_len_value_correct": 0.5,
        "cosine_max_len": None,
        "repetition_n_grams": 3,
        "repetition_max_penalty": -1.0,
        "soft_max_length": None,
        "soft_cache_length": None,
        "dynamic_sample": False,
        "max_resample_times": 3,
        "overlong_filter": False,
        "scale_rewards": None,
        "advantage_estimator": "grpo",
        "kl_in_reward": None,
        "wandb_log_unique_prompts": None,
        "log_completions": False,
        "rollout_importance_sampling_mode": None,
        "rollout_importance_sampling_threshold": 2.0,
        "log_rollout_offpolicy_metrics": False,
        "off_policy_sequence_mask_delta": None,
        "log_entropy": False,
        "top_entropy_quantile": 1.0,
        "router_replay_mode": "disabled",
        "reward_model": None,
        "reward_model_plugin": None,
        "sync_ref_model": False,
        "ref_model_sync_steps": 512,
        "ref_model_mixup_alpha": 0.6,
        "async_generate": False,
        "move_model_batches": None,
        "multi_turn_scheduler": None,
        "max_turns": None,
        "completion_length_limit_scope": "per_round",
        "vllm_server_pass_dataset": False,
        "use_gym_env": None,
        "gym_env": None,
        "num_iterations": 1,
    },
    "it belongs to another trainer of ms-swift": {
        "enable_dft_loss": False,
        "enable_channel_loss": False,
        "mrl_dims": None,
        "num_labels": None,
        "problem_type": None,
    },
    "it is for generating text, and this run generates none": {
        "max_new_tokens": None,
        "num_beams": 1,
        "stream": None,
        "stop_words": [],
        "logprobs": False,
        "top_logprobs": None,
        "structured_outputs_regex": None,
    },
    "Megatron's weights are not quantised by it": {
        "quant_method": None,
        "quant_bits": None,
        "hqq_axis": None,
        "bnb_4bit_compute_dtype": None,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": None,
    },
    "the Megatron backend builds the model itself, and reads other flags for it": {
        "attn_impl": None,
        "experts_impl": None,
        "device_map": None,
        "max_memory": None,
        "init_strategy": None,
        "tuner_backend": "peft",
    },
    "it is Megatron-FSDP's, which BVPO refuses": {
        "data_parallel_sharding_strategy": "optim_grads_params",
        "strict_fsdp_dtensor_load": True,
    },
}
# What to use instead, where there is something.
INSTEAD = {
    "sequence_packing_scheduler": "pack with --packing true",
    "attn_impl": "use --attention_backend",
    "experts_impl": "leave the flag out",
    "data_parallel_sharding_strategy": "use --use_distributed_optimizer (the default), which shards the optimizer",
}


def given_unread(argv: list[str]) -> dict[str, str]:
    """The flags above that stand on a command line, with what was given."""
    found = {}
    for name in (name for flags in UNREAD.values() for name in flags):
        if option_values(argv, name):
            found[name] = " ".join(option_list(argv, name)) or "true"  # a bare flag switches on
    return found


def refuse_unread(values: Mapping[str, Any]) -> None:
    """Raise UserError for the first flag of `values` (name to value) that asks for something and would do nothing."""
    for reason, flags in UNREAD.items():
        for name, default in flags.items():
            if name in values and not _same(values[name], default):
                raise UserError(
                    f"{name} is {values[name]!r} and would change nothing: {reason}",
                    field=f"--{name}",
                    remedy=INSTEAD.get(name, "leave the flag out"),
                )


def _same(value: Any, default: Any) -> bool:
    """Whether a value, from a parser or from a YAML file, asks for no more than the default."""
    if value in (None, "", [], {}) or value == default:
        return True
    if isinstance(default, list):
        items = value if isinstance(value, (list, tuple)) else str(value).split()
        return [str(x) for x in items] == [str(x) for x in default]
    text = str(value).strip().lower()
    if isinstance(default, bool):
        return text in (TRUE if default else FALSE)
    if isinstance(default, (int, float)):
        try:
            return float(text) == float(default)
        except ValueError:
            return False
    return text == str(default).lower()
