"""What a single value may be: counts, ranges, choices, JSON. For the run itself and for `bvpo plan`.

ms-swift's parser knows an int from a text. What it lets through and Megatron, torch or datasets then trip over, often
after the model is loaded, is here. tests/unit/test_every_flag.py gives every flag a wrong value.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from megatron_bvpo.errors import UserError

# Whole numbers from here on, where they are given at all.
AT_LEAST = {
    **dict.fromkeys(
        (
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
            "max_model_len",
            "lora_rank",
            "recompute_num_layers",
            "bvpo_probe_interval",
            "early_stop_interval",
            "train_iters",
            "num_train_epochs",
            "lr_decay_iters",
            "lr_wsd_decay_iters",
            "logging_steps",
            "dataset_num_proc",
            "packing_num_proc",
            "shuffle_buffer_size",
            "dataloader_prefetch_factor",
            "tensorboard_queue_size",
            "seed",
            "fp8_amax_history_len",
        ),
        1,
    ),
    # 0 is never, or none.
    **dict.fromkeys(
        (
            "save_steps",
            "eval_steps",
            "lr_warmup_iters",
            "dataloader_num_workers",
            "manual_gc_steps",
            "bvpo_mu_warmup_steps",
            "bvpo_mu_decay_steps",
            "data_seed",
            "mtp_num_layers",
        ),
        0,
    ),
    "eval_iters": -1,  # as many as the held-out rows need
    "save_total_limit": 2,  # ms-swift's own rule
    "ddp_timeout": 60,  # Megatron counts in minutes
}
SEEDS = ("seed", "data_seed")
# Numbers, where they are given at all; an interval as in mathematics.
RANGES = {
    "lora_alpha": "(0, inf)",
    "lora_dropout": "[0, 1)",
    "split_dataset_ratio": "[0, 1)",
    "freeze_parameters_ratio": "[0, 1]",
    "optimizer_offload_fraction": "[0, 1]",
    "lr": "[0, inf)",
    "min_lr": "[0, inf)",
    "lr_warmup_init": "[0, inf)",
    "lr_warmup_fraction": "[0, 1)",
    "weight_decay": "[0, inf)",
    "start_weight_decay": "[0, inf)",
    "end_weight_decay": "[0, inf)",
    "clip_grad": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_eps": "(0, inf)",
    "sgd_momentum": "[0, 1)",
    "moe_aux_loss_coeff": "[0, inf)",
    "moe_z_loss_coeff": "[0, inf)",
    "interleave_prob": "[0, 1]",
    "rpo_alpha": "[0, inf)",
    "beta": "(-inf, inf)",  # finite; objective/preference.py has the rest
    "bvpo_simpo_gamma": "(-inf, inf)",
    "bvpo_empty_beta": "(0, inf)",
    "bvpo_short_beta": "(0, inf)",
    "bvpo_mu_peak": "[0, 1]",
    "bvpo_mu_valley": "[0, 1]",
    "bvpo_gate_threshold": "[0, 1)",
    "bvpo_logp_memory": "(0, 1024]",
    "bvpo_alpha_prior": "[0, 1]",
    "bvpo_kappa": "(0, 1]",
    "bvpo_moment_decay": "[0, 0.9999]",
}
# What no parser looks at: Megatron's own lists, for what ms-swift takes as any text, and the plugin's settings.
CHOICES = {
    "torch_dtype": ("bfloat16", "float16", "float32"),
    "attention_backend": ("flash", "flash_2", "flash_3", "flash_4", "fused", "unfused", "local", "auto"),
    "cp_comm_type": ("p2p", "all_gather", "a2a", "a2a+p2p"),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"),
    "recompute_modules": ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"),
    "bvpo_criterion": ("mse", "sgd"),
    "bvpo_empty": ("strip", "require", "own"),
    "bvpo_gate": ("none", "hpt"),
    "bvpo_logp_impl": ("auto", "fused", "triton", "te", "torch"),
    "report_to": ("tensorboard", "wandb", "swanlab", "none"),
}
# Texts that hold a JSON object.
OBJECTS = (
    "columns model_kwargs megatron_extra_kwargs vit_gradient_checkpointing_kwargs max_memory mrl_dims "
    "vllm_limit_mm_per_prompt vllm_engine_kwargs rope_scaling"
).split()
# Words that stand for one.
WORDS = {"rope_scaling": ("linear", "dynamic", "yarn")}
PATTERNS = ("target_regex", "freeze_parameters_regex", "trainable_parameters_regex")
_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")
_DEFAULT = "leave the flag out for its default"


def check_values(args: Any) -> None:
    """Raise UserError for the first value that is out of range or of no known kind.

    Args:
        args: an object with ms-swift's argument names as attributes; those that it lacks are not checked.
    """
    check_counts(args, AT_LEAST)
    for name, interval in RANGES.items():
        for value in _values(args, name):
            _check_range(name, value, interval)
    for name, allowed in CHOICES.items():
        _check_choices(name, _values(args, name), allowed)
    for name in OBJECTS:
        for value in _values(args, name):
            _check_object(name, value)
    for name in PATTERNS:
        for value in _values(args, name):
            try:
                re.compile(value)
            except re.error as e:
                raise UserError(f"{value!r} is no regular expression: {e}", field=f"--{name}") from None


def check_counts(args: Any, names: Iterable[str]) -> None:
    """The same for these names of AT_LEAST only."""
    for name in names:
        for value in _values(args, name):
            _check_count(name, value, AT_LEAST[name])


def _values(args: Any, name: str) -> list:
    """The values of a flag: none where it is not given."""
    value = getattr(args, name, None)
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"is {value}; expected {least} or more", field=f"--{name}", remedy=_DEFAULT)
    if name in SEEDS and value >= 2**32:
        raise UserError(f"is {value}; expected less than 2**32", field=f"--{name}", remedy=_DEFAULT)


def _check_range(name: str, value: float, interval: str) -> None:
    left, low, high, right = _INTERVAL.fullmatch(interval).groups()
    low, high = float(low), float(high)
    above = low <= value if left == "[" else low < value
    below = value <= high if right == "]" else value < high
    if not (above and below):  # nor is nan
        raise UserError(f"is {value}; expected a number in {interval}", field=f"--{name}", remedy=_DEFAULT)


def _check_choices(name: str, values: list, allowed: tuple[str, ...]) -> None:
    for value in values:
        # The plugin comes after ms-swift has made torch's and Megatron's own types of some names.
        if str(getattr(value, "name", value)).removeprefix("torch.") not in allowed:
            remedy = "write several as words of their own, not in one pair of quotes" if " " in value else None
            raise UserError(f"has {value!r}; expected {', '.join(allowed)}", field=f"--{name}", remedy=remedy)


def _check_object(name: str, value: Any) -> None:
    """JSON, or a file with it, or Python's way of writing it. ms-swift would make something of broken JSON, too."""
    words = WORDS.get(name, ())
    if isinstance(value, dict) or value in words or os.path.isfile(value):
        return
    for read in (json.loads, ast.literal_eval):
        try:
            if isinstance(read(value), dict):
                return
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise UserError(
        f"is {value!r}; expected {', '.join([*words, 'a JSON object'])}",
        field=f"--{name}",
        remedy="""for example '{"key": "value"}', in single quotes on a command line""",
    )
