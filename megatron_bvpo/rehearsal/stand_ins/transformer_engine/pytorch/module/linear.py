"""Linear: column-parallel, row-parallel or replicated."""

from __future__ import annotations

import torch

from .. import collectives
from .base import (
    TransformerEngineBaseModule,
    default_init,
    mark_tensor_parallel,
    refuse_unsupported,
    resolve_device,
)
from .weight_gradient import accumulates, product


class Linear(TransformerEngineBaseModule):
    """y = x W^T + b, with x [s, ..., in] and W [out, in].

    parallel_mode "column": W holds out/tp rows. The input is replicated (its gradient is all-reduced), or,
    under sequence parallelism, [s/tp, ...] and gathered along dim 0 (its gradient is reduce-scattered).
    parallel_mode "row": W holds in/tp columns. The partial outputs are all-reduced, or reduce-scattered along
    dim 0 under sequence parallelism; the bias is added after that.
    None: no communication.

    With `fuse_wgrad_accumulation` the weight's gradient goes to `weight.main_grad` (weight_gradient.py).

    Returns y, or (y, bias) with `return_bias`, where the bias is then not added.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group=None,
        tp_size: int = 1,
        get_rng_state_tracker=None,
        rng_tracker_name: str | None = None,
        init_method=None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        super().__init__(name)
        refuse_unsupported(
            "Linear",
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
            parameters_split=parameters_split,
            ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs,
            ub_overlap_rs_dgrad=ub_overlap_rs_dgrad,
            ub_bulk_dgrad=ub_bulk_dgrad,
            ub_bulk_wgrad=ub_bulk_wgrad,
        )
        self._set_up_parallelism(tp_group, tp_size, sequence_parallel, parallel_mode)
        self.in_features = _share(in_features, self.tp_size if parallel_mode == "row" else 1, "in_features")
        self.out_features = _share(out_features, self.tp_size if parallel_mode == "column" else 1, "out_features")
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = save_original_input
        self.ub_name = ub_name
        self.get_rng_state_tracker = get_rng_state_tracker
        self.rng_tracker_name = rng_tracker_name
        self._make_linear_parameters(init_method, params_dtype, device)

    def _make_linear_parameters(self, init_method, params_dtype, device) -> None:
        factory = {"device": resolve_device(device), "dtype": params_dtype or torch.get_default_dtype()}
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **factory))
        self._initialise(self.weight, default_init if init_method is None else init_method)
        mark_tensor_parallel(self.weight, dim=1 if self.parallel_mode == "row" else 0)
        if not self.use_bias:
            # TE keeps an empty tensor under the name, not None.
            self.bias = torch.empty(0, **factory)
            return
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **factory))
        if self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            mark_tensor_parallel(self.bias, dim=0)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self._check_dtype(inp)
        out = self._product(self._enter_columns(inp), is_first_microbatch)
        return (out, self.bias) if self.return_bias else out

    # parallel_mode and sequence_parallel are read at every call: mcore-bridge and Megatron's shared experts
    # change them on finished layers.

    def _enter_columns(self, inp: torch.Tensor) -> torch.Tensor:
        if self.parallel_mode != "column":
            return inp
        if self.sequence_parallel:
            return collectives.all_gather(inp, self.tp_group)
        return collectives.replicated(inp, self.tp_group)

    def _product(self, inp: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
        bias = self.bias if self.apply_bias else None
        fused = dict(fused=self.fuse_wgrad_accumulation, accumulate=accumulates(self.weight, is_first_microbatch))
        if self.parallel_mode != "row" or self.tp_size == 1:
            return product(inp, self.weight, bias, **fused)
        out = product(inp, self.weight, None, **fused)
        leave = collectives.reduce_scatter if self.sequence_parallel else collectives.all_reduce
        out = leave(out, self.tp_group)
        return out if bias is None else out + bias


def _share(features: int, ranks: int, what: str) -> int:
    if features % ranks:
        raise ValueError(f"{what}={features} cannot be divided over {ranks} tensor-parallel ranks.")
    return features // ranks
