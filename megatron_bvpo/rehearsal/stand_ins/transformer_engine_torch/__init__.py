"""The one function of TE's compiled module that megatron-core calls from Python: cutting packs for CP."""

from __future__ import annotations

import torch


def thd_get_partitioned_indices(cu_seqlens, total_tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Indices of a pack's tokens that context-parallel rank `cp_rank` holds: [total_tokens / cp_size], int32.

    Args:
        cu_seqlens: [sequences + 1] bounds with paddings; each length a multiple of 2 * cp_size.
    """
    from transformer_engine.pytorch.context_parallel import packed_positions

    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != total_tokens:
        raise ValueError(f"cu_seqlens ends at {sum(lengths)}, the pack has {total_tokens} tokens.")
    return packed_positions(lengths, cp_size, cp_rank).to(cu_seqlens.device, torch.int32)
