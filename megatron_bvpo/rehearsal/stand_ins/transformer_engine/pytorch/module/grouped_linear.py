"""GroupedLinear: one weight per expert, applied to consecutive blocks of rows."""

from __future__ import annotations

import torch

from .base import (
    TransformerEngineBaseModule,
    default_init,
    mark_tensor_parallel,
    refuse_unsupported,
    resolve_device,
)
from .linear import _share
from .weight_gradient import accumulates, product


class GroupedLinear(TransformerEngineBaseModule):
    """x [T, in] cut in `num_gemms` blocks of `m_splits` rows; block i is multiplied with weight{i} [out, in].

    It never communicates: `tp_size` and `parallel_mode` only size the weights, and Megatron's token
    dispatcher moves the tokens. A block of 0 rows gives its weight a zero gradient, as in TE, so every
    expert has one; with `fuse_wgrad_accumulation` its `main_grad` is left alone, or zeroed in a first
    micro-batch, which overwrites. Returns y [T, out], or (y, [bias0, ...]) with `return_bias`.
    """

    def __init__(
        self,
        num_gemms: int,
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
        device="cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ):
        super().__init__(name)
        refuse_unsupported(
            "GroupedLinear",
            delay_wgrad_compute=delay_wgrad_compute,
            ub_overlap_rs=ub_overlap_rs,
            ub_overlap_ag=ub_overlap_ag,
            single_grouped_weight=single_grouped_weight,
            single_grouped_bias=single_grouped_bias,
            use_grouped_tensor=use_grouped_tensor,
        )
        self._set_up_parallelism(tp_group, tp_size, sequence_parallel, parallel_mode)
        if self.tp_size > 1 and bias:
            raise ValueError("GroupedLinear has no bias under tensor parallelism: it could not be added only once.")
        self.num_gemms = num_gemms
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
        self._make_parameters(init_method, params_dtype, resolve_device(device))

    def _make_parameters(self, init_method, params_dtype, device) -> None:
        factory = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        for i in range(self.num_gemms):
            weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **factory))
            self._initialise(weight, default_init if init_method is None else init_method)
            mark_tensor_parallel(weight, dim=1 if self.parallel_mode == "row" else 0)
            setattr(self, f"weight{i}", weight)
            if not self.use_bias:
                setattr(self, f"bias{i}", torch.empty(0, **factory))
                continue
            bias = torch.nn.Parameter(torch.zeros(self.out_features, **factory))
            if self.parallel_mode == "row":
                bias.sequence_parallel = self.sequence_parallel
            elif self.parallel_mode == "column":
                mark_tensor_parallel(bias, dim=0)
            setattr(self, f"bias{i}", bias)

    def forward(self, inp, m_splits, is_first_microbatch=None, out=None, dgrad_out=None):
        self._check_dtype(inp)
        refuse_unsupported("GroupedLinear.forward", out=out is not None, dgrad_out=dgrad_out is not None)
        splits = [int(rows) for rows in m_splits]
        if len(splits) != self.num_gemms:
            raise ValueError(f"m_splits has {len(splits)} entries for {self.num_gemms} weights.")
        rows = inp.reshape(-1, self.in_features)
        if sum(splits) != rows.shape[0]:
            raise ValueError(f"m_splits sums to {sum(splits)} rows, the input has {rows.shape[0]}.")
        # As in TE, the first weight answers for all.
        fused = self.fuse_wgrad_accumulation and self.weight0.requires_grad
        accumulate = accumulates(self.weight0, is_first_microbatch)
        blocks = []
        for i, block in enumerate(torch.split(rows, splits)):
            weight, bias = getattr(self, f"weight{i}"), getattr(self, f"bias{i}") if self.apply_bias else None
            blocks.append(product(block, weight, bias, fused=fused, accumulate=accumulate))
        out = torch.cat(blocks).reshape(*inp.shape[:-1], self.out_features)
        if self.return_bias:
            return out, [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        return out
