"""LayerNormLinear: a normalisation followed by a (column-parallel) Linear."""

from __future__ import annotations

import torch

from .. import collectives
from .base import resolve_device
from .linear import Linear
from .normalization import normalise


class LayerNormLinear(Linear):
    """y = norm(x) W^T + b, with x [s, ..., in]; under sequence parallelism x is [s/tp, ...] and the
    normalised input is gathered along dim 0 before the product.

    Returns y; (y, bias) with `return_bias`; the normalised input comes last with `return_layernorm_output`,
    as it is before the gather, or after it with `return_layernorm_output_gathered`. Megatron's wrapper
    expects TE's nesting `(y, normed)` or `(y, bias, normed)`, and reads `return_layernorm_output` at every
    call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group=None,
        tp_size: int = 1,
        get_rng_state_tracker=None,
        init_method=None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split=None,
        zero_centered_gamma: bool = False,
        device="cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ):
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization {normalization!r} is neither 'LayerNorm' nor 'RMSNorm'.")
        if parallel_mode == "row":
            raise NotImplementedError("LayerNormLinear cannot be row-parallel: the norm needs whole rows.")
        # Set before the parent makes its parameters, so that the norm's come first, as TE registers them.
        self._norm_options = (normalization, zero_centered_gamma)
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            get_rng_state_tracker=get_rng_state_tracker,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            parameters_split=parameters_split,
            device=device,
            ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs,
            ub_overlap_rs_dgrad=ub_overlap_rs_dgrad,
            ub_bulk_wgrad=ub_bulk_wgrad,
            ub_bulk_dgrad=ub_bulk_dgrad,
            ub_name=ub_name,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
            name=name,
        )
        self.eps = eps
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output and return_layernorm_output_gathered

    def _make_linear_parameters(self, init_method, params_dtype, device) -> None:
        self.normalization, self.zero_centered_gamma = self._norm_options
        factory = {"device": resolve_device(device), "dtype": params_dtype or torch.get_default_dtype()}
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(self.in_features, **factory))
        self._fill(self.layer_norm_weight, 0.0 if self.zero_centered_gamma else 1.0)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if self.normalization == "RMSNorm":
            self.layer_norm_bias = None
        else:
            self.layer_norm_bias = torch.nn.Parameter(torch.empty(self.in_features, **factory))
            self._fill(self.layer_norm_bias, 0.0)
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel
        super()._make_linear_parameters(init_method, params_dtype, device)

    @staticmethod
    def _fill(param: torch.Tensor, value: float) -> None:
        if param.device.type != "meta":
            torch.nn.init.constant_(param, value)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self._check_dtype(inp)
        normed = normalise(
            self.normalization,
            inp,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            self.zero_centered_gamma,
        )
        gathered = self.return_layernorm_output_gathered and self.sequence_parallel
        if gathered:
            normed = collectives.all_gather(normed, self.tp_group)
            out = self._product(normed, is_first_microbatch)
        else:
            out = self._product(self._enter_columns(normed), is_first_microbatch)
        outputs = [out]
        if self.return_bias:
            outputs.append(self.bias)
        if self.return_layernorm_output:
            outputs.append(normed)
        return tuple(outputs) if len(outputs) > 1 else out
