"""LayerNormMLP: norm, first linear, activation, second linear. Megatron's specs do not use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import collectives
from .base import (
    TransformerEngineBaseModule,
    default_init,
    mark_tensor_parallel,
    refuse_unsupported,
    resolve_device,
)
from .normalization import normalise

_ACTIVATIONS = {
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), False),
    "relu": (F.relu, False),
    "silu": (F.silu, False),
    "geglu": (lambda x: F.gelu(x, approximate="tanh"), True),
    "reglu": (F.relu, True),
    "swiglu": (F.silu, True),
}


class LayerNormMLP(TransformerEngineBaseModule):
    """x [s, ..., H] -> [s, ..., H] through `ffn_hidden_size`; gated activations double the first layer's
    rows.

    With `set_parallel_mode` the first linear is column-parallel and the second row-parallel over `tp_group`.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        get_rng_state_tracker=None,
        tp_group=None,
        tp_size: int = 1,
        init_method=None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        output_layer_init_method=None,
        fuse_wgrad_accumulation: bool = False,
        params_dtype: torch.dtype | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        set_parallel_mode: bool = False,
        zero_centered_gamma: bool = False,
        device="cuda",
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
        **unused,
    ):
        super().__init__(name)
        refuse_unsupported(
            "LayerNormMLP",
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
        )
        if activation not in _ACTIVATIONS:
            raise NotImplementedError(f"activation {activation!r} is not one of {sorted(_ACTIVATIONS)}.")
        if return_layernorm_output_gathered:
            raise NotImplementedError("LayerNormMLP(return_layernorm_output_gathered=True) is not supported.")
        self._set_up_parallelism(tp_group, tp_size, sequence_parallel, None)
        if not set_parallel_mode:
            self.tp_size, self.sequence_parallel = 1, False
        self.set_parallel_mode = set_parallel_mode
        self.activation, self.normalization = activation, normalization
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.use_bias, self.return_bias = bias, return_bias
        self.return_layernorm_output = return_layernorm_output
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, None

        factory = {"device": resolve_device(device), "dtype": params_dtype or torch.get_default_dtype()}
        rows = ffn_hidden_size // self.tp_size * (2 if _ACTIVATIONS[activation][1] else 1)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.full((hidden_size,), float(not zero_centered_gamma), **factory)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(hidden_size, **factory))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel
        self.fc1_weight = torch.nn.Parameter(torch.empty(rows, hidden_size, **factory))
        self.fc2_weight = torch.nn.Parameter(torch.empty(hidden_size, ffn_hidden_size // self.tp_size, **factory))
        self._initialise(self.fc1_weight, init_method or default_init)
        self._initialise(self.fc2_weight, output_layer_init_method or default_init)
        mark_tensor_parallel(self.fc1_weight, dim=0)
        mark_tensor_parallel(self.fc2_weight, dim=1)
        self.fc1_bias = self.fc2_bias = None
        if bias:
            self.fc1_bias = torch.nn.Parameter(torch.zeros(rows, **factory))
            self.fc2_bias = torch.nn.Parameter(torch.zeros(hidden_size, **factory))
            mark_tensor_parallel(self.fc1_bias, dim=0)
            self.fc2_bias.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        self._check_dtype(inp)
        normed = normalise(
            self.normalization,
            inp,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            self.zero_centered_gamma,
        )
        group = self.tp_group if self.set_parallel_mode else None
        enter = collectives.all_gather if self.sequence_parallel else collectives.replicated
        leave = collectives.reduce_scatter if self.sequence_parallel else collectives.all_reduce
        hidden = F.linear(enter(normed, group), self.fc1_weight, self.fc1_bias)
        activate, gated = _ACTIVATIONS[self.activation]
        if gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = activate(gate) * value
        else:
            hidden = activate(hidden)
        out = leave(F.linear(hidden, self.fc2_weight), group)
        if self.use_bias and not self.return_bias:
            out = out + self.fc2_bias
        outputs = [out]
        if self.return_bias:
            outputs.append(self.fc2_bias)
        if self.return_layernorm_output:
            outputs.append(normed)
        return tuple(outputs) if len(outputs) > 1 else out
