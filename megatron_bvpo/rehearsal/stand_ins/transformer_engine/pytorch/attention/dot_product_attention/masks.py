"""Which key each query may see.

True means **hidden**, Megatron's and TE's convention. Shape suffixes: B batch, N heads, Q queries, K keys.
"""

from __future__ import annotations

import torch


def causal(query_positions_Q, key_positions_K) -> torch.Tensor:
    """[Q, K]: keys after the query are hidden."""
    return key_positions_K[None, :] > query_positions_Q[:, None]


def outside_window(query_positions_Q, key_positions_K, window: tuple[int, int]) -> torch.Tensor:
    """[Q, K]: keys more than window[0] before or window[1] after the query are hidden; -1 is no limit."""
    distance_QK = query_positions_Q[:, None] - key_positions_K[None, :]
    hidden_QK = torch.zeros_like(distance_QK, dtype=torch.bool)
    if window[0] >= 0:
        hidden_QK |= distance_QK > window[0]
    if window[1] >= 0:
        hidden_QK |= -distance_QK > window[1]
    return hidden_QK


def padding_of(attention_mask, cu_seqlens_q, cu_seqlens_kv, queries: int, keys: int, device):
    """The padded queries [B, Q] and keys [B, K] of a padded batch.

    From the mask: one [B, 1, 1, K] for self-attention, or a pair for queries and keys; else from the lengths.
    """
    if attention_mask is not None:
        q_mask, kv_mask = attention_mask if isinstance(attention_mask, tuple) else (attention_mask, attention_mask)
        return q_mask.reshape(q_mask.shape[0], -1), kv_mask.reshape(kv_mask.shape[0], -1)
    if cu_seqlens_q is None:
        raise ValueError("a padding mask type needs an attention_mask [B, 1, 1, S] or cu_seqlens_q; both are None.")
    cu_seqlens_kv = cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
    q_lengths, kv_lengths = cu_seqlens_q.diff().to(device), cu_seqlens_kv.diff().to(device)
    return (
        torch.arange(queries, device=device)[None] >= q_lengths[:, None],
        torch.arange(keys, device=device)[None] >= kv_lengths[:, None],
    )
