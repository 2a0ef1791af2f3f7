"""What TE's layers have in common: parallel groups, parameter attributes, extra state, initialisation."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .. import collectives
from .weight_gradient import get_dummy_wgrad  # noqa: F401  (Megatron takes it from here)

PARALLEL_MODES = ("row", "column", None)


def resolve_device(device) -> torch.device:
    """TE's default is "cuda"; where torch has no CUDA that can only mean the CPU."""
    if device is None or (isinstance(device, str) and device.startswith("cuda")) or isinstance(device, int):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    return torch.device(device)


def mark_tensor_parallel(param: torch.Tensor, dim: int) -> None:
    """TE's flags for a partitioned parameter. TE sets them on **every** linear weight, replicated ones too,
    and Megatron's duplicate filter believes them; a better stand-in would show other gradient norms."""
    param.tensor_model_parallel = True
    param.partition_dim = dim
    param.partition_stride = 1


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of Linear, LayerNormLinear, LayerNormMLP, GroupedLinear and DotProductAttention."""

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False, "fp8_group": None}
        self.fp8_initialized = False
        self.primary_weights_in_fp8 = False
        self.sequence_parallel = False
        self.tp_group = None
        self.tp_group_initialized = False
        self.tp_size = 1

    def set_tensor_parallel_group(self, tp_group) -> None:
        self.tp_group = tp_group
        self.tp_group_initialized = True

    def _set_up_parallelism(self, tp_group, tp_size: int, sequence_parallel: bool, parallel_mode) -> None:
        if parallel_mode not in PARALLEL_MODES:
            raise ValueError(f"parallel_mode {parallel_mode!r} is not one of {PARALLEL_MODES}.")
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(None)
        else:
            self.tp_size = collectives.world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def _initialise(self, param: torch.Tensor, init_method) -> None:
        """Fill `param` under the tensor-parallel random state, as TE does. On "meta" it is left alone."""
        if param.device.type == "meta" or init_method is None:
            return
        context = nullcontext()
        if self.get_rng_state_tracker is not None:
            tracker = self.get_rng_state_tracker()
            context = tracker.fork(self.rng_tracker_name) if self.rng_tracker_name else tracker.fork()
        with torch.no_grad(), context:
            init_method(param)

    def _check_dtype(self, inp: torch.Tensor) -> None:
        """TE refuses an input in another dtype than its parameters."""
        if torch.is_autocast_enabled(inp.device.type):
            return
        for name, param in self.named_parameters(recurse=False):
            if param.dtype != inp.dtype:
                raise TypeError(
                    f"the input is {inp.dtype} and parameter {name!r} is {param.dtype}; they must be the "
                    "same outside of autocast."
                )

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> torch.Tensor:
        """TE saves FP8 state here; without FP8 it is an empty byte tensor, and checkpoints hold its key."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        pass


def refuse_unsupported(layer: str, **options) -> None:
    """Raise NotImplementedError for the first option that is on."""
    remedies = {
        "fuse_wgrad_accumulation": "--gradient_accumulation_fusion false",
        "delay_wgrad_compute": "--delay_wgrad_compute false",
        "symmetric_ar_type": "symmetric_ar_type None",
        "ub_overlap_ag": "--tp_comm_overlap false",
        "ub_overlap_rs": "--tp_comm_overlap false",
        "ub_overlap_rs_dgrad": "--tp_comm_overlap false",
        "ub_bulk_wgrad": "--tp_comm_overlap false",
        "ub_bulk_dgrad": "--tp_comm_overlap false",
        "parameters_split": "parameters_split=None",
        "single_grouped_weight": "single_grouped_weight False",
        "single_grouped_bias": "single_grouped_bias False",
        "use_grouped_tensor": "use_grouped_tensor None",
        "out": "out=None",
        "dgrad_out": "dgrad_out=None",
    }
    for option, value in options.items():
        if value:
            raise NotImplementedError(
                f"{layer}({option}={value!r}) is not in the transformer_engine stand-in. Set {remedies[option]}."
            )


def default_init(weight: torch.Tensor) -> None:
    torch.nn.init.normal_(weight, mean=0.0, std=0.023)


def initialize_ub(*args, **kwargs) -> None:
    raise NotImplementedError("user buffers need a GPU: set --tp_comm_overlap false.")
