"""Tiles of the target log-probability with the passes over a tile fused in Triton.

The same functions as `torch_logprob.py`, which says what they compute. Matrix products stay with the vendor's
library, with float32 output; between them **one** Triton pass per tile reads the float32 logits once, leaves
the target out, adds up s and writes exp(l - a) in the dtype of the next product:

    logits_nv = x·Wᵀ          vendor, float32 out
    exp pass                  reads 4 bytes and writes 2 (bf16) per logit; no row maximum, no second read
    products  = exp_nv·W      vendor, float32 out

Without products (no gradient) the pass only reads.

Shapes: n tokens of a block, H hidden size, V this rank's real vocabulary rows, v rows of one tile.
Dtypes: x and W float32 or bfloat16 (float16 cannot hold exp(l - a)); logits, anchors and sums float32.
Importing this module needs Triton; running it needs CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from megatron_bvpo.kernels import torch_logprob
from megatron_bvpo.kernels.torch_logprob import add_product, operand, product, tiles

PASS_BLOCK = 2048  # 40 registers a thread (sm_90, triton 3.6), so that 6 programs of 8 warps share a multiprocessor
PASS_WARPS = 8
LOG2_E = 1 / math.log(2)
ROW_ALIGNMENT = 16  # elements; keeps rows of an odd vocabulary on 16-byte boundaries for both factors


@triton.jit
def _exp_pass(
    logits_ptr, anchor_ptr, local_ptr, s_ptr, exp_ptr,
    moment_ptr, unit,
    first, columns, logits_stride, exp_stride,
    WRITE: tl.constexpr, MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: s += Σ e with e = exp2((l - a)·unit), 0 in the target's column; e if WRITE, Σ e log2 e if MOMENT."""
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2^31 from 14k tokens × 152k words on
    anchor = tl.load(anchor_ptr + row)
    target = tl.load(local_ptr + row) - first
    logits_ptr += row * logits_stride
    exp_ptr += row * exp_stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    moment = tl.zeros([BLOCK], dtype=tl.float32)
    # No mask on whole blocks: a bound that is no multiple of 16 would make every load and store a scalar one.
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        column = start + tl.arange(0, BLOCK)
        power = (tl.load(logits_ptr + column) - anchor) * unit
        value = tl.where(column == target, 0.0, tl.math.exp2(power))
        total += value
        if MOMENT:
            moment += value * power
        if WRITE:
            tl.store(exp_ptr + column, value.to(exp_ptr.dtype.element_ty))
    column = whole + tl.arange(0, BLOCK)
    logit = tl.load(logits_ptr + column, mask=column < columns, other=float("-inf"))
    power = (logit - anchor) * unit
    value = tl.where(column == target, 0.0, tl.math.exp2(power))
    total += value
    if MOMENT:
        moment += tl.where(column < columns, value * power, 0.0)
        tl.store(moment_ptr + row, tl.load(moment_ptr + row) + tl.sum(moment, axis=0))
    if WRITE:
        tl.store(exp_ptr + column, value.to(exp_ptr.dtype.element_ty), mask=column < columns)
    tl.store(s_ptr + row, tl.load(s_ptr + row) + tl.sum(total, axis=0))


@triton.jit
def _grad_pass(
    logits_ptr, anchor_ptr, local_ptr, scale_ptr, s_ptr, grad_ptr,
    unit, columns, logits_stride, grad_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a row: scale · exp2((l - a)·unit), and -scale · s in the target's column."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(local_ptr + row)
    logit = tl.load(logits_ptr + row * logits_stride + column, mask=column < columns, other=float("-inf"))
    value = tl.math.exp2((logit - tl.load(anchor_ptr + row)) * unit)
    value = tl.where(column == target, -tl.load(s_ptr + row), value) * tl.load(scale_ptr + row)
    out = value.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row * grad_stride + column, out, mask=column < columns)


@triton.jit
def _target_logit(
    x_ptr, weight_ptr, local_ptr, out_ptr,
    rows, hidden, x_stride, weight_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: x · W[target] in float32, 0 where the target is no row of this shard (rows > 0)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(local_ptr + row)
    owned = (target >= 0) & (target < rows)
    weight_row = tl.where(owned, target, 0)  # read a row that exists, and drop it at the end
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + offsets
        inside = column < hidden
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + weight_row * weight_stride + column, mask=inside, other=0.0).to(tl.float32)
        total += x * w
    tl.store(out_ptr + row, tl.where(owned, tl.sum(total, axis=0), 0.0))


@triton.jit
def _finish_gradient(
    products_ptr, weight_ptr, local_ptr, s_ptr, scale_ptr, position_ptr, out_ptr,
    rows, hidden, products_stride, weight_stride, out_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: (products - s W[target]) · scale, in the row of `out` that `position` names (rows > 0)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(local_ptr + row)
    owned = (target >= 0) & (target < rows)
    s = tl.where(owned, tl.load(s_ptr + row), 0.0)
    scale = tl.load(scale_ptr + row)
    products_ptr += row * products_stride
    weight_ptr += tl.where(owned, target, 0) * weight_stride
    out_ptr += tl.load(position_ptr + row) * out_stride
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden
        w = tl.load(weight_ptr + column, mask=inside).to(tl.float32)
        value = (tl.load(products_ptr + column, mask=inside) - s * w) * scale
        tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def target_logits(x_nH: torch.Tensor, weight_VH: torch.Tensor, local_n: torch.Tensor) -> torch.Tensor:
    """l_t of the tokens whose target this rank owns, 0 for the others. [n] float32"""
    if weight_VH.stride(1) != 1 or x_nH.stride(1) != 1:
        return torch_logprob.target_logits(x_nH, weight_VH, local_n)  # better than a copy of the head
    n, hidden = x_nH.shape
    out_n = torch.zeros(n, dtype=torch.float32, device=x_nH.device)
    block = min(triton.next_power_of_2(max(hidden, 16)), 1024)
    if n and weight_VH.shape[0]:
        _target_logit[(n,)](
            x_nH, weight_VH, local_n, out_n,
            weight_VH.shape[0], hidden, x_nH.stride(0), weight_VH.stride(0),
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out_n


def sum_exp(
    x_nH: torch.Tensor,
    weight_VH: torch.Tensor,
    local_n: torch.Tensor,
    anchor_n: torch.Tensor,
    *,
    temperature: float,
    tile_vocab: int,
    with_products: bool,
    with_moment: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """s [n], and moment [n] and products [n, H] if asked for, over this rank's rows. One product, or two."""
    n = x_nH.shape[0]
    s_n = torch.zeros(n, dtype=torch.float32, device=x_nH.device)
    moment_n = torch.zeros_like(s_n) if with_moment else None
    products_nH = None
    x_nH = operand(x_nH)
    logits = tile_buffer(n, min(tile_vocab, weight_VH.shape[0]), torch.float32, x_nH.device)
    # A float32 tile is overwritten in place: each logit is read and written by the same thread.
    in_place = not with_products or operand(weight_VH[:1]).dtype == torch.float32
    exp = logits if in_place else tile_buffer(*logits.shape, weight_VH.dtype, x_nH.device)
    for start, tile_vH in tiles(weight_VH, tile_vocab):
        tile_vH = operand(tile_vH)
        v = tile_vH.shape[0]
        product(x_nH, tile_vH.T, out=logits[:, :v])
        _exp_pass[(n,)](
            logits, anchor_n, local_n, s_n, exp, s_n if moment_n is None else moment_n, LOG2_E / temperature,
            start, v, logits.stride(0), exp.stride(0),
            WRITE=with_products, MOMENT=with_moment, BLOCK=_pass_block(v), num_warps=PASS_WARPS,
        )  # fmt: skip
        if products_nH is not None:
            add_product(products_nH, exp[:, :v], tile_vH)
        elif with_products:
            products_nH = product(exp[:, :v], tile_vH)
    if with_products and products_nH is None:  # a rank whose rows are all padding
        products_nH = torch.zeros(x_nH.shape, dtype=torch.float32, device=x_nH.device)
    if moment_n is not None:
        moment_n /= LOG2_E
    return s_n, moment_n, products_nH


def finish_gradient(
    products_nH: torch.Tensor,
    weight_VH: torch.Tensor,
    local_n: torch.Tensor,
    s_n: torch.Tensor,
    scale_n: torch.Tensor,
    out_NH: torch.Tensor,
    positions_n: torch.Tensor,
) -> None:
    """out[positions] = (products - s W_t)·scale, rounded once, in one pass over [n, H]."""
    if weight_VH.stride(1) != 1 or weight_VH.shape[0] == 0:
        return torch_logprob.finish_gradient(products_nH, weight_VH, local_n, s_n, scale_n, out_NH, positions_n)
    n, hidden = products_nH.shape
    block = min(triton.next_power_of_2(max(hidden, 16)), 1024)
    _finish_gradient[(n,)](
        products_nH, weight_VH, local_n, s_n, scale_n, positions_n, out_NH,
        weight_VH.shape[0], hidden, products_nH.stride(0), weight_VH.stride(0), out_NH.stride(0),
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def grad_logits(
    x_nH: torch.Tensor,
    tile_vH: torch.Tensor,
    local_n: torch.Tensor,
    anchor_n: torch.Tensor,
    scale_n: torch.Tensor,
    s_n: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """scale·e_v for v ≠ t, -scale·s at the target, for one vocabulary tile. [n, v] in the operand dtype."""
    n, v = x_nH.shape[0], tile_vH.shape[0]
    x_nH, tile_vH = operand(x_nH), operand(tile_vH)
    logits = tile_buffer(n, v, torch.float32, x_nH.device)
    grad = logits if tile_vH.dtype == torch.float32 else tile_buffer(n, v, tile_vH.dtype, x_nH.device)
    product(x_nH, tile_vH.T, out=logits[:, :v])
    block = _pass_block(v)
    _grad_pass[(n, triton.cdiv(v, block))](
        logits, anchor_n, local_n, scale_n, s_n, grad,
        LOG2_E / temperature, v, logits.stride(0), grad.stride(0),
        BLOCK=block, num_warps=PASS_WARPS,
    )  # fmt: skip
    return grad[:, :v]


def tile_buffer(n: int, v: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised [n, v rounded up]; only the first v columns are ever written or read."""
    return torch.empty(n, triton.cdiv(v, ROW_ALIGNMENT) * ROW_ALIGNMENT, dtype=dtype, device=device)


def _pass_block(v: int) -> int:
    return min(triton.next_power_of_2(max(v, 16)), PASS_BLOCK)
