"""TE's fused MoE permutations, for routing maps that are masks: [T, E], true where token t goes to expert e.

A permuted tensor has one row for each token and each of its experts: the first expert's tokens in their order, then
the second's. `row_id_map` [T, 2E + 1] int32 says where they went, as TE's does: a token's n rows (the highest first),
at E their experts, and n last.

Sums over a token's experts are made in at least float32 and rounded once, forward and backward, as in TE's kernels.
"""

from __future__ import annotations

import warnings

import torch


def moe_permute(inp, routing_map, num_out_tokens: int, max_token_num: int = -1, map_type: str = "mask"):
    """inp [T, H] -> (permuted [num_out_tokens, H], row_id_map). AssertionError where nothing is routed, as in TE."""
    _only_masks("moe_permute", map_type)
    permuted, _, row_id_map = _permute(inp, None, routing_map, num_out_tokens)
    return permuted, row_id_map


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens: int):
    """The same with probs [T, E] -> (permuted [n, H], permuted probs [n], row_id_map).

    A row whose probability is exactly 0 is taken for padding and becomes 0; its gradient goes to the token as ever.
    """
    return _permute(inp, probs, routing_map, num_out_tokens)


def moe_unpermute(
    inp,
    row_id_map,
    merging_probs=None,
    restore_shape=None,
    map_type: str = "mask",
    probs=None,
    pad_offsets=None,
):
    """inp [n, H] -> [T, H] (`restore_shape`): each token's rows added, weighted with `merging_probs` [T, E] if given.

    Without any rows it returns them as they are, [0, H], whatever `restore_shape` says: so does TE.
    """
    _only_masks("moe_unpermute", map_type)
    if pad_offsets is not None:
        raise NotImplementedError("moe_unpermute(pad_offsets=…) is not in the transformer_engine stand-in.")
    if probs is not None:
        if merging_probs is not None:
            raise ValueError("moe_unpermute was given merging_probs and probs, which is its older name.")
        warnings.warn("moe_unpermute: probs is the older name of merging_probs.", stacklevel=2)
        merging_probs = probs
    if not inp.numel():
        return inp.clone()
    tokens, experts = _where_from(row_id_map, inp.shape[0])
    rows = inp.to(_wide(inp))
    if merging_probs is not None:
        rows = rows * merging_probs[tokens, experts].to(rows.dtype).unsqueeze(-1)
    shape = inp.shape if restore_shape is None else restore_shape
    return rows.new_zeros(tuple(shape)).index_add(0, tokens, rows).to(inp.dtype)


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    """inp [n, H], cut in chunks of `split_sizes` rows -> the chunks in the order of `sorted_index`."""
    chunks = torch.split(inp, split_sizes.tolist())
    return torch.cat([chunks[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    """The same for inp and probs [n] -> both."""
    return (
        moe_sort_chunks_by_index(inp, split_sizes, sorted_index),
        moe_sort_chunks_by_index(probs, split_sizes, sorted_index),
    )


def _only_masks(name: str, map_type: str) -> None:
    if map_type != "mask":
        raise NotImplementedError(f"{name}(map_type={map_type!r}) is not in the transformer_engine stand-in.")


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _permute(inp, probs, routing_map, num_out_tokens):
    n_experts = routing_map.shape[1]
    if not inp.numel():
        no_probs = inp.new_empty(0, dtype=torch.float32 if probs is None else probs.dtype)
        return inp.clone(), no_probs, torch.empty((0, 2 * n_experts + 1), dtype=torch.int32, device=inp.device)
    num_out_tokens = int(num_out_tokens)
    assert num_out_tokens > 0, f"moe_permute (mask map) requires num_out_tokens > 0, got {num_out_tokens}."
    row_id_map = _make_row_id_map(routing_map)
    tokens, experts = _where_from(row_id_map, num_out_tokens)
    rows = inp.to(_wide(inp)).index_select(0, tokens).to(inp.dtype)
    if probs is None:
        return rows, None, row_id_map
    permuted_probs = probs[tokens, experts]
    padding = permuted_probs.detach().eq(0).unsqueeze(-1)
    if padding.any():
        rows = rows - torch.where(padding, rows.detach(), 0)  # so that it keeps its gradient
    return rows, permuted_probs, row_id_map


def _make_row_id_map(routing_map: torch.Tensor) -> torch.Tensor:
    """[T, E] -> [T, 2E + 1]; TE leaves what is behind a token's n entries as it was in memory, here it is -1."""
    mask_ET = routing_map.bool().t()
    rows_ET = mask_ET.flatten().cumsum(0).view_as(mask_ET) - 1
    rows_TE, experts_TE = rows_ET.masked_fill(~mask_ET, -1).t().sort(dim=1, descending=True)
    n_T1 = mask_ET.sum(0).unsqueeze(1)
    return torch.cat([rows_TE, experts_TE.masked_fill(rows_TE < 0, -1), n_T1], dim=1).to(torch.int32)


def _where_from(row_id_map: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each permuted row: its token and its expert, [n] each.

    Raises:
        ValueError: there are not as many rows as the map has, where TE reads or writes beyond its buffers.
    """
    n_experts = row_id_map.shape[1] // 2
    rows_TE, experts_TE = row_id_map[:, :n_experts].long(), row_id_map[:, n_experts:-1].long()
    valid_TE = rows_TE >= 0
    rows = rows_TE[valid_TE]
    if rows.numel() != n_rows:
        raise ValueError(f"the routing map names {rows.numel()} rows, but there are {n_rows}.")
    order = rows.argsort()
    tokens_TE = torch.arange(rows_TE.shape[0], device=rows.device).unsqueeze(1).expand_as(rows_TE)
    return tokens_TE[valid_TE][order], experts_TE[valid_TE][order]
