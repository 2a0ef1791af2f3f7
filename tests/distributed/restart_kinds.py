"""The kinds of checkpoint that train.sh lets a run write: every setting that changes what is in one, or in what form.

test_restarts.py kills a run of each kind and starts it again.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16 = {"bf16": "true", "torch_dtype": "bfloat16"}
PRECISE = {"use_precision_aware_optimizer": "true"}
OFFLOADED = BF16 | PRECISE | {"optimizer_cpu_offload": "true", "dist_ckpt_optim_fully_reshardable": "true"}


@dataclass(frozen=True)
class Kind:
    """A run, on one rank.

    Attributes:
        flags: what it is given beside the flags of all kinds; None takes one of these out.
        trains_as: the kind whose numbers it has to the last bit, killed or not; its own by default.
        steps: how many it takes; it is killed in the last one …
        last: … and has its last checkpoint of this one.
    """

    flags: dict[str, str | None]
    trains_as: str | None = None
    steps: int = 4
    last: int = 2


EPOCHS = {"train_iters": None, "num_train_epochs": "2", "save_strategy": "epoch", "save_steps": None}
FULL = {"tuner_type": "full", "lora_rank": None, "lora_dropout": None, "merge_lora": None}
# Words in capitals are files and folders that the test makes.
IN_CI = {
    "reshardable": Kind({"dist_ckpt_optim_fully_reshardable": "true"}, "lora"),
    "alpha-auto": Kind({"bvpo_alpha": "auto"}),
}
# Under `--whole-matrix`.
FURTHER = {
    "lora": Kind({}),
    "epochs": Kind(EPOCHS, "lora"),  # in CI through train.sh
    "full": Kind(FULL),
    # ---- what is written, and in what form
    "merged": Kind({"merge_lora": "true"}, "lora"),
    "no-safetensors": Kind({"save_safetensors": "false"}, "lora"),
    "few-checkpoints": Kind({"save_total_limit": "2", "save_steps": "1"}, last=3),
    "no-rng": Kind({"no_save_rng": "true"}, "lora"),
    "reshardable-little-memory": Kind(
        {"dist_ckpt_optim_fully_reshardable": "true", "distrib_optim_fully_reshardable_mem_efficient": "true"}, "lora"
    ),
    "missing-weights": Kind(FULL | {"save_missing_weights": "true"}, "full"),
    "full-no-safetensors": Kind(FULL | {"save_safetensors": "false"}, "full"),
    "full-reshardable": Kind(FULL | {"dist_ckpt_optim_fully_reshardable": "true"}, "full"),
    "random-states-in-te": Kind({"te_rng_tracker": "true"}),
    "best": Kind(
        {"val_dataset": "HELD_OUT", "eval_iters": None, "eval_steps": "1", "metric_for_best_model": "loss"}
        | {"greater_is_better": "true"}
    ),
    # ---- the optimizer
    "no-shards": Kind({"use_distributed_optimizer": "false"}),
    "full-no-shards": Kind(FULL | {"use_distributed_optimizer": "false"}),
    "bf16": Kind(BF16),
    "full-bf16": Kind(FULL | BF16),
    # The loss scale falls until nothing overflows, from step 16 on.
    "fp16": Kind({"fp16": "true", "torch_dtype": "float16", "save_steps": "17"}, steps=19, last=17),
    "small-moments": Kind(FULL | OFFLOADED | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}),
    "small-gradients": Kind(FULL | OFFLOADED | {"main_grads_dtype": "bf16"}),
    "offloaded": Kind(FULL | OFFLOADED),
    "lora-offloaded": Kind(OFFLOADED | {"optimizer_offload_fraction": "1"}),
    # ---- what is trained
    "router": Kind({"target_modules": "all-linear all-router", "use_rslora": "true", "lora_alpha": "16"}),
    "regex": Kind({"target_regex": r".*(experts\.linear_fc1|linear_proj)"}),
    "whole-modules": Kind({"modules_to_save": "word_embeddings"}),
    "frozen": Kind(FULL | {"freeze_parameters_regex": r".*\.router\.weight"}),
    # ---- where it begins: the restart must not begin there again
    "from-an-adapter": Kind({"adapters": "START"}),
    "from-a-megatron-adapter": Kind({"mcore_adapter": "START"}),
    "from-a-megatron-model": Kind(FULL | {"mcore_model": "FULL_START"}),
    "on-a-megatron-model": Kind({"mcore_model": "FULL_START"}),
    "with-a-reference-adapter": Kind({"adapters": "START", "ref_adapters": "START"}),
    "with-a-reference-model": Kind(FULL | {"ref_model": "OTHER_MODEL"}),
    # ---- what has been consumed
    "streaming": Kind({"streaming": "true"}),
    "held-out-share": Kind({"split_dataset_ratio": "0.25", "eval_iters": None, "eval_steps": "1"}),
    "lazy": Kind({"lazy_tokenize": "true"}, "lora"),
    "packing": Kind({"packing": "true", "packing_length": "820", "global_batch_size": "2"}),
    "padded": Kind({"padding_free": "false"}),
    "sharded-rows": Kind({"data_sharding": "true"}),
    "by-length": Kind({"group_by_length": "true", "padding_free": "false"}),
    "in-order": Kind({"train_dataloader_shuffle": "false", "dataset_shuffle": "false"}),
    "kept-references": Kind({"bvpo_ref_cache": "CACHE"}),
}
KINDS = IN_CI | FURTHER

# Every flag whose name says that a checkpoint may depend on it is set by a kind or stands here.
MAY_MATTER = (
    r"save|ckpt|checkpoint|optim|offload|exp_avg|main_(grads|params)|merge|shard|rng|random|tuner|adapter|mcore"
    r"|train_iters|epoch|split_dataset|pack|stream|lazy|cached|fp16|bf16|best|modules_to|lora"
)
REFUSED = {
    "by train.sh (test_a_run_that_saves_no_optimizer_is_not_begun…)": "no_save_optim",
    "by the run": """
        async_save create_checkpoint_symlink dist_ckpt_save_pre_mcore_014 lora_bias lora_dtype
        sequence_packing_scheduler
    """,
}
NO_MATTER = {
    "another method's, task's or backend's": """
        _teacher_use_disable_adapter max_shard_size muon_scalar_optimizer offload_bridge offload_model
        offload_optimizer offload_teacher_model stream tuner_backend use_swift_lora vit_gradient_checkpointing
        vit_gradient_checkpointing_kwargs vllm_enable_lora data_parallel_sharding_strategy optimizer_cuda_graph
    """,
    "read with async_save alone, which is refused": "use_persistent_ckpt_worker",
    "adam is all there is": "optimizer",
    "of one data-parallel rank there is one": "data_parallel_random_init overlap_param_gather_with_optimizer_step",
    "how a run that goes on reads": "no_load_optim no_load_rng",
    "another name of a reference": "mcore_ref_adapter mcore_ref_model",
    "of Transformer Engine's own optimizer, which the stand-ins lack": "main_params_dtype",
    "what is learnt from, no way of reading (test_weights_state.py: other streams on a resume)": "bvpo_streams",
    "rows that are ready when the run begins": "cached_dataset cached_val_dataset packing_num_proc packing_strategy",
}
