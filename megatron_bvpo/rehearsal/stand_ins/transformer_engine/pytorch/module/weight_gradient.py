"""Weight gradients written straight into `main_grad`, as TE does under `fuse_wgrad_accumulation`.

The weight's own `.grad` is then no gradient: TE returns uninitialised memory, so that the hooks of Megatron's DDP
run, and tells them by `grad_added_to_main_grad` that nothing is to be added. Here that memory is filled with NaN:
whoever adds it nevertheless is noticed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def get_dummy_wgrad(shape, dtype, zero: bool = False) -> torch.Tensor:
    """What stands for a gradient that is in `main_grad` already: NaN, or zeros where others add theirs to it."""
    from .base import resolve_device

    return torch.full(tuple(shape), 0.0 if zero else torch.nan, dtype=dtype, device=resolve_device(None))


def add_product(main_grad: torch.Tensor, grad_rows: torch.Tensor, rows: torch.Tensor, accumulate: bool = True) -> None:
    """main_grad [out, in] (+)= grad_rows [n, out]^T rows [n, in], summed in at least float32.

    Without rows (an expert that got no tokens) it is left alone, or zeroed where it is overwritten.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    gradient = grad_rows.to(wide).t() @ rows.to(wide)
    main_grad.copy_(main_grad.to(wide) + gradient if accumulate else gradient)


def accumulates(weight: torch.Tensor, is_first_microbatch: bool | None) -> bool:
    """False: `main_grad` is overwritten. None, which is Megatron's answer without a transpose cache, accumulates."""
    return not is_first_microbatch and not getattr(weight, "overwrite_main_grad", False)


def product(inp, weight, bias, *, fused: bool, accumulate: bool) -> torch.Tensor:
    """inp [..., in] W^T + b -> [..., out]. `fused`: the weight's gradient goes to `weight.main_grad`."""
    if fused and weight.requires_grad:
        return _FusedProduct.apply(inp, weight, bias, accumulate)
    return F.linear(inp, weight, bias)


class _FusedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp, weight, bias, accumulate):
        ctx.save_for_backward(inp, weight)
        ctx.weight = weight  # for its attributes
        ctx.accumulate = accumulate
        return F.linear(inp, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        inp, values = ctx.saved_tensors
        weight = ctx.weight
        grad_rows = grad.reshape(-1, grad.shape[-1])
        add_product(weight.main_grad, grad_rows, inp.reshape(-1, inp.shape[-1]), ctx.accumulate)
        dummy = None
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            dummy = get_dummy_wgrad(weight.shape, weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))
        grad_inp = grad @ values if ctx.needs_input_grad[0] else None
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_inp, dummy, grad_bias, None
