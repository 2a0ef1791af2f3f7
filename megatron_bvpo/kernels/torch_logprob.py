"""Tiles of the target log-probability in plain torch, on any device.

Per token with logits l_v = x·W_v, target t, temperature T, anchor a (MATH.md §4; a = l_t except in the fallback):

    e_v = exp((l_v - a)/T) for v ≠ t,    s = Σ e_v,    moment = Σ e_v (l_v - a)/T,    products = Σ e_v W_v

Everything here is local to one tensor-parallel rank and one block of tokens; `autograd.py` adds the ranks up
and finishes. `triton_logprob.py` has the same functions with the passes over a tile fused.

Shapes: n tokens of a block, H hidden size, V this rank's real (unpadded) vocabulary rows, v rows of one tile.
Dtypes: x and W are float64, float32, bfloat16 or float16; logits, sums and products are float32 (float64
for float64). `local_n` is the target's row in this rank's shard; out of [0, V) where another rank owns it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

MAX_TOKENS, MAX_ROWS = 64, 8192  # of a product in `row_max`


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x: torch.Tensor) -> torch.Tensor:
    """`x` as a factor of `product`: bfloat16 as it is on a GPU, else widened.

    CPU products of 16-bit factors round their result, and float16 cannot hold exp(l - a), which reaches e^80.
    """
    return x if x.is_cuda and x.dtype == torch.bfloat16 else x.to(accumulate_dtype(x.dtype))


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b with an unrounded (float32, float64) result: bf16 logits alone cost up to 3e-2 in a logp."""
    dtype = accumulate_dtype(a.dtype)
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, accumulated in the dtype of `total`, in place wherever the library does so."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(a, b))


def tiles(weight_VH: torch.Tensor, tile_vocab: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, weight_VH.shape[0], tile_vocab):
        yield start, weight_VH[start : start + tile_vocab]


def target_logits(x_nH: torch.Tensor, weight_VH: torch.Tensor, local_n: torch.Tensor) -> torch.Tensor:
    """l_t of the tokens whose target this rank owns, 0 for the others. [n]"""
    dtype = accumulate_dtype(x_nH.dtype)
    if weight_VH.shape[0] == 0:
        return torch.zeros(x_nH.shape[0], dtype=dtype, device=x_nH.device)
    return (x_nH.to(dtype) * target_rows(weight_VH, local_n)).sum(1)


def target_rows(weight_VH: torch.Tensor, local_n: torch.Tensor) -> torch.Tensor:
    """W_t of the tokens whose target this rank owns, zeros for the others. [n, H] float32 (float64)"""
    rows = weight_VH.shape[0]
    dtype = accumulate_dtype(weight_VH.dtype)
    if rows == 0:
        return torch.zeros(local_n.shape[0], weight_VH.shape[1], dtype=dtype, device=weight_VH.device)
    owned_n = (local_n >= 0) & (local_n < rows)
    return weight_VH.index_select(0, local_n.clamp(0, rows - 1)).to(dtype).mul_(owned_n[:, None])


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
    n, hidden = x_nH.shape
    s_n = torch.zeros(n, dtype=anchor_n.dtype, device=x_nH.device)
    moment_n = torch.zeros_like(s_n) if with_moment else None
    products_nH = None
    x_nH = operand(x_nH)
    scratch = torch.empty(n * min(tile_vocab, weight_VH.shape[0]), dtype=anchor_n.dtype, device=x_nH.device)
    for start, tile_vH in tiles(weight_VH, tile_vocab):
        tile_vH = operand(tile_vH)
        exp_nv = _exp_tile(x_nH, tile_vH, local_n - start, anchor_n, temperature, scratch)
        s_n += exp_nv.sum(1)
        if moment_n is not None:
            moment_n += torch.xlogy(exp_nv, exp_nv).sum(1)  # e·log e, 0 where e is
        if products_nH is not None:
            add_product(products_nH, exp_nv.to(tile_vH.dtype), tile_vH)
        elif with_products:
            products_nH = product(exp_nv.to(tile_vH.dtype), tile_vH)
    if with_products and products_nH is None:  # a rank whose rows are all padding
        products_nH = torch.zeros(n, hidden, dtype=anchor_n.dtype, device=x_nH.device)
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
    """out[positions] = (products - s W_t)·scale, rounded once; W_t is zero where another rank owns the target.

    `products_nH` may be rows of `out_NH`.
    """
    grad_nH = target_rows(weight_VH, local_n).mul_(-s_n[:, None]).add_(products_nH).mul_(scale_n[:, None])
    out_NH.index_copy_(0, positions_n, grad_nH.to(out_NH.dtype))


def grad_logits(
    x_nH: torch.Tensor,
    tile_vH: torch.Tensor,
    local_n: torch.Tensor,
    anchor_n: torch.Tensor,
    scale_n: torch.Tensor,
    s_n: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """scale·e_v for v ≠ t and -scale·s at the target, for one vocabulary tile. [n, v] in the operand dtype.

    With scale = -upstream / (T (s + e_t)) this is the gradient of Σ upstream·logps with respect to the logits.
    The target's own entry is a small number here, so rounding it to bf16 costs a relative 2^-9 and no more.
    """
    n, v = x_nH.shape[0], tile_vH.shape[0]
    scratch = torch.empty(n * v, dtype=anchor_n.dtype, device=x_nH.device)
    x_nH, tile_vH = operand(x_nH), operand(tile_vH)
    grad_nv = _exp_tile(x_nH, tile_vH, local_n, anchor_n, temperature, scratch)
    owned_n = (local_n >= 0) & (local_n < v)
    at_target_n1 = torch.where(owned_n, -s_n, 0.0)[:, None]
    grad_nv.scatter_add_(1, local_n.clamp(0, v - 1)[:, None], at_target_n1)
    return grad_nv.mul_(scale_n[:, None]).to(tile_vH.dtype)


def row_max(x_nH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """max_v l_v over this rank's rows, -inf where it has none. [n]; only the overflow fallback needs it.

    In products of one fixed shape: the library rounds by the shape, and a token's anchor, so its logp, must not depend
    on how many others overflow, nor on the sizes of a call's tiles.
    """
    n, hidden = x_nH.shape
    dtype = accumulate_dtype(x_nH.dtype)
    max_n = torch.full((n,), float("-inf"), dtype=dtype, device=x_nH.device)
    padded = torch.zeros(-(-n // MAX_TOKENS) * MAX_TOKENS, hidden, dtype=x_nH.dtype, device=x_nH.device)
    padded[:n] = x_nH
    for start in range(0, n, MAX_TOKENS):
        part_nH = operand(padded[start : start + MAX_TOKENS])
        for _, tile_vH in tiles(weight_VH, MAX_ROWS):
            found_n = product(part_nH, operand(tile_vH).T).amax(1)[: n - start]
            max_n[start : start + MAX_TOKENS] = torch.maximum(max_n[start : start + MAX_TOKENS], found_n)
    return max_n


def _exp_tile(
    x_nH: torch.Tensor,
    tile_vH: torch.Tensor,
    local_n: torch.Tensor,
    anchor_n: torch.Tensor,
    temperature: float,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """exp((x·Wᵀ - anchor)/T) in `scratch`, with 0 in the target's column. [n, v]"""
    n, v = x_nH.shape[0], tile_vH.shape[0]
    logits_nv = scratch[: n * v].view(n, v)
    product(x_nH, tile_vH.T, out=logits_nv)
    logits_nv.sub_(anchor_n[:, None])
    if temperature != 1:
        logits_nv.mul_(1 / temperature)
    owned_n = (local_n >= 0) & (local_n < v)
    column_n1 = local_n.clamp(0, v - 1)[:, None]
    # One scatter for all rows, owned or not: choosing the owned ones would need a device synchronisation.
    kept_n1 = logits_nv.gather(1, column_n1).masked_fill_(owned_n[:, None], float("-inf"))
    return logits_nv.scatter_(1, column_n1, kept_n1).exp_()
