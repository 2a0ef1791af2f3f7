"""`RunSettings`: the keys of a run's YAML file that decide its memory and time, with ms-swift's names and defaults.

A plan reads the file without ms-swift, which takes half a minute to load; tests/unit/test_plan_settings.py compares
the defaults with the arguments' own.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bvpo.data.verdicts import UNPAIRED, RowRules
from megatron_bvpo.launching.stream_flags import StreamSettings, read_streams
from megatron_bvpo.streams import DEFAULT, estimators, sides_of

# What changes the memory in a way that nobody worked out: name, value that is understood, what it would do.
NOT_PLANNED = (
    ("pipeline_model_parallel_layout", None, "splits the layers in its own way"),
    ("use_megatron_fsdp", False, "shards the parameters, and BVPO refuses it"),
    ("modules_to_save", [], "trains whole modules beside the adapters"),
    ("trainable_parameters", [], "trains some parameters only"),
    ("freeze_parameters", [], "trains some parameters only"),
    ("freeze_parameters_ratio", 0.0, "trains some parameters only"),
    ("target_regex", None, "chooses the adapted modules by name"),
    ("mtp_num_layers", None, "adds layers, and BVPO refuses it"),
    ("fp8_format", None, "keeps activations in 8 bits"),
    ("fp8_param_gather", False, "keeps parameters in 8 bits"),
    ("fp4_format", None, "keeps activations in 4 bits"),
    ("megatron_extra_kwargs", None, "sets what Megatron does behind the flags"),
)


@dataclass(frozen=True)
class RunSettings:
    """What the plan needs to know of a run. Lengths in tokens, sizes in ranks; names and defaults are ms-swift's."""

    model: str = ""
    rlhf_type: str = "bvpo"
    # layout
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    microbatch_group_size_per_vp_stage: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None
    # batch
    micro_batch_size: int = 1
    global_batch_size: int = 16
    max_length: int | None = None
    packing: bool = False
    packing_length: int | None = None
    padding_free: bool = True
    # tuner
    tuner_type: str = "full"
    target_modules: tuple[str, ...] = ("all-linear",)
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    ref_adapters: tuple[str, ...] = ()
    freeze_parameters_regex: str | None = None
    merge_lora: bool | None = None
    # precision and optimizer
    torch_dtype: str | None = None
    fp16: bool | None = None
    bf16: bool | None = None
    optimizer: str = "adam"
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_param_gather_with_optimizer_step: bool = False
    accumulate_allreduce_grads_in_fp32: bool = False
    use_precision_aware_optimizer: bool = False
    main_grads_dtype: str = "fp32"
    main_params_dtype: str = "fp32"
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    # activations
    recompute_granularity: str = "selective"
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ("core_attn",)
    apply_rope_fusion: bool = False
    moe_permute_fusion: bool = False
    attention_backend: str = "flash"
    ddp_backend: str = "nccl"
    # the objective
    loss_type: str | None = None
    reference_free: bool = False
    moe_aux_loss_coeff: tuple[float, ...] = (0.0,)
    moe_z_loss_coeff: float | None = None
    f_divergence_type: str = "reverse_kl"
    bvpo_streams: tuple[str, ...] = DEFAULT
    bvpo_weights: tuple[str, ...] = ()
    bvpo_alpha: str = "auto"
    bvpo_alpha_prior: float = 0.5
    bvpo_kappa: float = 0.03
    bvpo_moment_decay: float = 0.9
    bvpo_probe_interval: int = 10
    bvpo_logp_impl: str = "auto"
    bvpo_logp_memory: float = 1.0
    bvpo_new_layers_only: bool = False
    bvpo_ref_cache: str | None = None
    # read only to judge the rows of --rows as the run does
    bvpo_empty: str = "strip"
    bvpo_gate: str = "none"
    bvpo_gate_threshold: float = 0.0
    columns: str | None = None
    disable_auto_column_mapping: bool = False
    # read only to say what the run refuses (launching/refusals.py)
    use_megatron_fsdp: bool = False
    moe_expert_capacity_factor: float | None = None
    async_save: bool = False
    no_save_optim: bool = False
    dist_ckpt_optim_fully_reshardable: bool = False
    calculate_per_token_loss: bool = False
    task_type: str | None = None
    loss_scale: str | None = "last_round"
    truncation_strategy: str | None = None
    streaming: bool = False
    group_by_length: bool = False
    fp8_param_gather: bool = False
    fp4_param_gather: bool = False
    mtp_num_layers: int | None = None
    cp_partition_mode: str = "zigzag"
    bridge_backend: str = "mcore-bridge"
    moe_token_dispatcher_type: str = "alltoall"
    lora_bias: str = "none"
    lora_dtype: str | None = None
    lora_alpha: float = 32.0
    use_rslora: bool = False
    target_regex: str | None = None
    modules_to_save: tuple[str, ...] = ()
    new_special_tokens: tuple[str, ...] = ()
    freeze_parameters: tuple[str, ...] = ()
    freeze_parameters_ratio: float = 0.0
    trainable_parameters: tuple[str, ...] = ()
    trainable_parameters_regex: str | None = None
    save_safetensors: bool = True
    adapters: tuple[str, ...] = ()
    mcore_adapter: str | None = None
    mcore_ref_adapter: str | None = None
    ref_model: str | None = None
    mcore_ref_model: str | None = None
    mcore_model: str | None = None
    finetune: bool = True

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a parameter and of an activation: 16 bits unless the file asks for float32."""
        if self.fp16 or self.bf16:
            return 2
        return 4 if str(self.torch_dtype) in ("float32", "fp32", "torch.float32") else 2

    @property
    def grad_bytes(self) -> int:
        """Bytes of a gradient in Megatron's buffers; ms-swift turns float32 accumulation on with bf16."""
        if self.dtype_bytes == 4 or self.accumulate_allreduce_grads_in_fp32:
            return 4
        return 2 if self.fp16 or self.main_grads_dtype == "bf16" else 4

    @property
    def vpp(self) -> int:
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def lora(self) -> bool:
        return self.tuner_type != "full"

    @property
    def head_frozen(self) -> bool:
        return self.lora or self.bvpo_new_layers_only

    @property
    def recompute(self) -> str:
        return str(self.recompute_granularity or "none")

    @property
    def router_frozen(self) -> bool:
        """What is trained whole leaves its routers' weights as they are."""
        return bool(self.freeze_parameters_regex) and (not self.lora or self.bvpo_new_layers_only)

    @property
    def rehearsal(self) -> bool:
        """A run on CPU ranks: plain PyTorch stands in for Transformer Engine and saves other tensors."""
        return self.ddp_backend == "gloo"

    @property
    def streams(self) -> tuple[str, ...]:
        return self._streams.streams if self.rlhf_type == "bvpo" else ("trace",)

    @property
    def sequences(self) -> int:
        """Of a row that takes part in every stream."""
        return sum(len(self.sides(stream)) for stream in self.streams)

    def sides(self, stream: str) -> tuple[str, ...]:
        """The sequences of a row in one stream."""
        return sides_of(stream, unpaired=self.unpaired)

    @property
    def unpaired(self) -> bool:
        """The loss takes single responses with a label."""
        return self.rlhf_type == "bvpo" and self.loss_type in UNPAIRED

    @property
    def rules(self) -> RowRules:
        """What the run asks of its rows."""
        threshold = self.bvpo_gate_threshold if self.bvpo_gate == "hpt" else None
        return RowRules(self.bvpo_empty, self.streams, unpaired=self.unpaired, gate_threshold=threshold)

    @property
    def measures_baselines(self) -> bool:
        """Each step is preceded by a pass of policy and reference over mismatched responses."""
        return self.unpaired and self.loss_type == "kto" and bool(estimators(self.streams))

    @property
    def probes(self) -> bool:
        """Whether some steps measure the streams' gradients."""
        return self.rlhf_type == "bvpo" and self._streams.measured

    @property
    def _streams(self) -> StreamSettings:
        return read_streams(self.bvpo_streams, self.bvpo_weights, self.bvpo_alpha)

    @property
    def uses_reference(self) -> bool:
        pairs = self.rlhf_type != "bvpo" or bool(estimators(self.streams))
        return pairs and not (self.reference_free or self.loss_type == "simpo")

    @property
    def runs_reference(self) -> bool:
        """Whether each step runs the reference; a filled cache saves the time, but not the memory of a miss."""
        return self.uses_reference and not self.bvpo_ref_cache

    @property
    def router_losses(self) -> bool:
        return any(self.moe_aux_loss_coeff) or bool(self.moe_z_loss_coeff)
