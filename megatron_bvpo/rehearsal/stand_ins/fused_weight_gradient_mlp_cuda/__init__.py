"""apex's kernels for weight gradients that are added to `main_grad`; Megatron's own linear layers call them."""

from __future__ import annotations

import torch
from transformer_engine.pytorch.module.weight_gradient import add_product


def wgrad_gemm_accum_fp32(input: torch.Tensor, d_output: torch.Tensor, d_weight: torch.Tensor) -> None:
    """d_weight [out, in] float32 += d_output [..., out]^T input [..., in].

    Raises:
        TypeError: `d_weight` is not float32.
    """
    if d_weight.dtype != torch.float32:
        raise TypeError(f"wgrad_gemm_accum_fp32 adds to a float32 gradient; this one is {d_weight.dtype}.")
    _add(input, d_output, d_weight)


def wgrad_gemm_accum_fp16(input: torch.Tensor, d_output: torch.Tensor, d_weight: torch.Tensor) -> None:
    """The same for a bfloat16 or float16 `d_weight`, whose dtype the other two must have.

    Raises:
        TypeError: they do not.
    """
    if d_weight.dtype not in (torch.float16, torch.bfloat16) or not input.dtype == d_output.dtype == d_weight.dtype:
        raise TypeError(
            "wgrad_gemm_accum_fp16 takes three bfloat16 or three float16 tensors; these are "
            f"{input.dtype}, {d_output.dtype} and {d_weight.dtype}."
        )
    _add(input, d_output, d_weight)


def _add(input, d_output, d_weight) -> None:
    add_product(d_weight, d_output.reshape(-1, d_output.shape[-1]), input.reshape(-1, input.shape[-1]))
