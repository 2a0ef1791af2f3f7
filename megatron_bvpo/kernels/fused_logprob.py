"""Tiles of the target log-probability with the exponentials in the epilogue of the product (Hopper).

The same functions as `torch_logprob.py`, which says what they compute. Logits never leave the multiprocessor that
made them:

    acc        = x·Wᵀ of one output tile, bf16 factors through TMA, float32 in registers
    epilogue   e = exp2((acc - a)·log2 e / T), 0 in the target's column and in rows that are padding;
               Σ e of the tile's columns per token (and Σ e log e, for the entropy); e in bf16 where the second
               product needs it
    products   = e·W      vendor's library, float32 out

The anchor a is known before the product, so that the epilogue needs no running maximum and no second look. A program
stays on its multiprocessor and takes one output tile after the other. Sums are written per output tile and added in a
fixed order: s is the same to the last bit with and without products, whatever the blocks of tokens and vocabulary.

Shapes: n tokens of a block, H hidden size, V this rank's real vocabulary rows.
Dtypes: x and W bfloat16 (float32 for checks only: its products do not use the tensor cores); sums float32.
Importing this module needs Triton 3.4 or newer; running it needs a Hopper GPU, or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_bvpo.kernels.torch_logprob import add_product, operand, product
from megatron_bvpo.kernels.triton_logprob import (
    LOG2_E,
    finish_gradient,
    grad_logits,
    target_logits,
    tile_buffer,
)

__all__ = ["finish_gradient", "grad_logits", "obstacle", "sum_exp", "target_logits"]

TILE_TOKENS = 128  # an output tile: what two warpgroups hold in registers
TILE_ROWS = 256
TILE_BYTES = 128  # of H that a stage holds, one TMA swizzle
STAGES = 3
WARPS = 8
GROUP = 8  # output tiles of tokens that share columns of W while these are in the L2 cache
TMA_ALIGNMENT = 16  # bytes, of a tensor's start and of its rows
INTERPRETED_PROGRAMS = 3  # so that a program has several output tiles in tests too
SUM_TILES, SUM_TOKENS = 32, 64  # of partial sums that one step of `_add_partial_sums` adds up


@triton.jit
def _exp_tile(acc, first, rows, anchor, unit, local, MOMENT: tl.constexpr, COLUMNS: tl.constexpr):
    """(e = exp2(acc·unit - anchor), 0 in the target's column and past the vocabulary; Σ e; Σ e log2 e or 0)."""
    column = first + tl.arange(0, COLUMNS)
    left_out = (column[None, :] == local[:, None]) | (column[None, :] >= rows)
    e = tl.where(left_out, 0.0, tl.math.exp2(acc * unit - anchor[:, None]))
    total = tl.sum(e, axis=1)
    # The logarithm again: the powers, kept, would cost registers that are not there.
    return e, total, tl.sum(e * tl.math.log2(tl.maximum(e, 1e-37)), axis=1) if MOMENT else total


@triton.jit(do_not_specialize=["n", "first_tile"])
def _exp_product(
    x_desc, weight_desc, exp_desc, anchor_ptr, local_ptr, sums_ptr, moments_ptr, unit,
    n, rows, hidden, first_tile,
    WRITE: tl.constexpr, MOMENT: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output tiles of exp2((x·Wᵀ - a)·unit): their sums over the rows of W, and themselves if WRITE.

    `rows` of W from output tile `first_tile` of the vocabulary on; sums_ptr, moments_ptr [tiles of the vocabulary, n].
    """
    tiles_n = tl.cdiv(n, TOKENS)
    tiles_v = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0)):
        group = tile // (GROUP * tiles_v)
        inside = tile % (GROUP * tiles_v)
        height = tl.minimum(tiles_n - group * GROUP, GROUP)
        first_token = (group * GROUP + inside % height) * TOKENS
        tile_v = inside // height
        acc = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(hidden, DEPTH), num_stages=STAGES):
            x = x_desc.load([first_token, k * DEPTH])
            weight = weight_desc.load([tile_v * ROWS, k * DEPTH])
            if WIDEN:  # the interpreter multiplies the bits of bf16 as if they were integers
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")
        token = first_token + tl.arange(0, TOKENS)
        anchor = tl.load(anchor_ptr + token, mask=token < n, other=0.0) * unit
        local = (tl.load(local_ptr + token, mask=token < n, other=-1) - first_tile * ROWS).to(tl.int32)
        # In two halves, which need half the registers and half the shared memory on the way out.
        left, right = tl.split(tl.permute(tl.reshape(acc, [TOKENS, 2, ROWS // 2]), [0, 2, 1]))
        column = tile_v * ROWS
        left, total, moment = _exp_tile(left, column, rows, anchor, unit, local, MOMENT, ROWS // 2)
        if WRITE:
            exp_desc.store([first_token, column], left.to(exp_desc.dtype))
        column += ROWS // 2
        right, right_total, right_moment = _exp_tile(right, column, rows, anchor, unit, local, MOMENT, ROWS // 2)
        if WRITE:
            exp_desc.store([first_token, column], right.to(exp_desc.dtype))
        offsets = (first_tile + tile_v).to(tl.int64) * n + token
        tl.store(sums_ptr + offsets, total + right_total, mask=token < n)
        if MOMENT:
            tl.store(moments_ptr + offsets, moment + right_moment, mask=token < n)


@triton.jit(do_not_specialize=["n", "tiles"])
def _add_partial_sums(sums_ptr, s_ptr, n, tiles, TILES: tl.constexpr, TOKENS: tl.constexpr):
    """s = Σ over the output tiles, [tiles, n] → [n]; the order depends on `tiles` alone."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS], dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & (token < n)[None, :]
        offsets = tile.to(tl.int64)[:, None] * n + token[None, :]
        total += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), axis=0)
    tl.store(s_ptr + token, total, mask=token < n)


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
    """s [n], and moment [n] and products [n, H] if asked for, over this rank's rows. One product, or two.

    `tile_vocab` bounds what `with_products` stores, in whole output tiles; without, nothing is stored and all rows go
    in one launch. The tensors must be fit for TMA (`obstacle`); rows of x that are not are copied.
    """
    n, rows = x_nH.shape[0], weight_VH.shape[0]
    new = functools.partial(torch.zeros, dtype=torch.float32, device=x_nH.device)
    s_n, moment_n = new(n), new(n) if with_moment else None
    if n == 0 or rows == 0:  # a rank whose rows are all padding
        return s_n, moment_n, new(x_nH.shape) if with_products else None
    # Not `contiguous`, which leaves a single row as it is.
    x_nH = x_nH if tma_fits(x_nH) else x_nH.clone(memory_format=torch.contiguous_format)
    tiles = triton.cdiv(rows, TILE_ROWS)
    sums = torch.empty(1 + with_moment, tiles, n, dtype=torch.float32, device=x_nH.device)
    unit = LOG2_E / temperature
    step = max(tile_vocab // TILE_ROWS, 1) * TILE_ROWS if with_products else rows
    exp, products_nH = None, None
    if with_products:
        exp = tile_buffer(n, min(step, rows), operand(weight_VH[:1]).dtype, x_nH.device)
    for start in range(0, rows, step):
        tile_vH = weight_VH[start : start + step]
        v = tile_vH.shape[0]
        _launch(x_nH, tile_vH, local_n, anchor_n, unit, sums, None if exp is None else exp[:, :v], start // TILE_ROWS)
        if products_nH is not None:
            add_product(products_nH, exp[:, :v], operand(tile_vH))
        elif with_products:
            products_nH = product(exp[:, :v], operand(tile_vH))
    for partial, out_n in zip(sums, (s_n, moment_n), strict=False):
        _add_partial_sums[(triton.cdiv(n, SUM_TOKENS),)](
            partial, out_n, n, tiles, TILES=SUM_TILES, TOKENS=SUM_TOKENS, num_warps=4
        )
    if moment_n is not None:
        moment_n /= LOG2_E
    return s_n, moment_n, products_nH


def _launch(x_nH, tile_vH, local_n, anchor_n, unit: float, sums, exp_nv, first_tile: int) -> None:
    n, hidden = x_nH.shape
    rows = tile_vH.shape[0]
    depth = TILE_BYTES // x_nH.element_size()
    x = TensorDescriptor.from_tensor(x_nH, [TILE_TOKENS, depth])
    weight = TensorDescriptor.from_tensor(tile_vH, [TILE_ROWS, depth])
    write = exp_nv is not None
    exp = TensorDescriptor.from_tensor(exp_nv, [TILE_TOKENS, TILE_ROWS // 2]) if write else x
    tiles = triton.cdiv(n, TILE_TOKENS) * triton.cdiv(rows, TILE_ROWS)
    _exp_product[(min(tiles, programs(x_nH.device)),)](
        x, weight, exp, anchor_n, local_n, sums[0], sums[-1], unit,
        n, rows, hidden, first_tile,
        WRITE=write, MOMENT=len(sums) > 1, WIDEN=not x_nH.is_cuda,
        TOKENS=TILE_TOKENS, ROWS=TILE_ROWS, DEPTH=depth, GROUP=GROUP, STAGES=STAGES,
        num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip


@functools.cache
def programs(device: torch.device) -> int:
    """One on each multiprocessor: its output tile takes nearly all registers."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def obstacle(x_NH: torch.Tensor, weight_VH: torch.Tensor) -> str | None:
    """Why this path cannot take these tensors, or None."""
    if x_NH.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(x_NH.device)[0] != 9):
        # Blackwell has TMA, but other matrix instructions, and as a workstation card half the shared memory.
        return f"{torch.cuda.get_device_name(x_NH.device)} is no Hopper, for which its tiles are made"
    if x_NH.shape[1] * x_NH.element_size() % TMA_ALIGNMENT or not tma_fits(weight_VH):
        return (
            f"rows of the head must lie contiguous and {TMA_ALIGNMENT} bytes aligned, got hidden size "
            f"{x_NH.shape[1]} and strides {tuple(weight_VH.stride())} of {weight_VH.dtype}"
        )
    return None


def tma_fits(x: torch.Tensor) -> bool:
    """Whether TMA can read it: contiguous rows, and they and the start aligned."""
    aligned = x.stride(0) * x.element_size() % TMA_ALIGNMENT == 0 and x.data_ptr() % TMA_ALIGNMENT == 0
    return x.stride(1) == 1 and aligned and x.stride(0) >= x.shape[1]
