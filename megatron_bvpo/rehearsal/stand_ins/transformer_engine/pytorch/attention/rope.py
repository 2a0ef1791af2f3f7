"""Rotary position embedding with the signature of TE's fused kernel, which Megatron's `apply_rope_fusion`
calls.

Shape suffixes: S sequence (of this rank), B batch, N heads, D head size, T packed tokens, R rotated part of
D.
"""

from __future__ import annotations

import itertools

import torch

from ..context_parallel import zigzag_positions


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """Rotate the first R of D features by the angles of each token's position.

    Args:
        t: [S, B, N, D] ("sbhd"), [B, S, N, D] ("bshd") or [T, N, D] ("thd").
        freqs: angles [positions, 1, 1, R], float32, for whole sequences (all context-parallel ranks).
        cu_seqlens: bounds of the packed sequences over all context-parallel ranks, paddings included; thd
        only. interleaved: pair neighbouring features instead of the two halves.

    Returns:
        the rotated tensor; cos and sin are taken in float32 and multiplied in float32, as the fused kernel
        does.
    """
    if start_positions is not None:
        raise NotImplementedError("apply_rotary_pos_emb(start_positions=...) is for inference; not in the stand-in.")
    if tensor_format == "thd":
        bounds = cu_seqlens.tolist()
        positions = [zigzag_positions(end - start, cp_size, cp_rank) for start, end in itertools.pairwise(bounds)]
        positions = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.long)
        # Padding behind the last sequence is rotated by 0.
        angles = freqs.new_zeros(t.shape[0], freqs.shape[-1])
        angles[: len(positions)] = freqs[positions.to(freqs.device), 0, 0]
        return _rotate(t, angles[:, None], interleaved)
    if tensor_format not in ("sbhd", "bshd"):
        raise ValueError(f"tensor_format {tensor_format!r} is not one of 'sbhd', 'bshd', 'thd'.")
    seq_dim = 0 if tensor_format == "sbhd" else 1
    angles = freqs[zigzag_positions(t.shape[seq_dim] * cp_size, cp_size, cp_rank).to(freqs.device)]
    return _rotate(t, angles if seq_dim == 0 else angles.transpose(0, 1), interleaved)


def _rotate(t, angles, interleaved: bool):
    wide = torch.promote_types(t.dtype, torch.float32)
    rotated, kept = t[..., : angles.shape[-1]].to(wide), t[..., angles.shape[-1] :]
    cos, sin = angles.to(wide).cos(), angles.to(wide).sin()
    if interleaved:
        turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return torch.cat(((rotated * cos + turned * sin).to(t.dtype), kept), dim=-1)
