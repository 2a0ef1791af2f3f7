"""DotProductAttention for padded and packed batches, with context parallelism.

Shape suffixes: B batch, Q queries, K keys, N query heads, G key/value heads (groups), D head size, T packed
tokens. Scores, softmax and the sum over values are in float32 at least; the output is in the query's dtype.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from ... import collectives
from ...context_parallel import gather_sequence, zigzag_positions
from ...module.base import TransformerEngineBaseModule, resolve_device
from . import masks

_MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)


def _miss_no_extra_state(module, incompatible) -> None:
    """Megatron saves none of attention, and loads virtual stages strictly; TE takes a checkpoint without, too."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if "core_attention._extra_state" not in key]


class DotProductAttention(TransformerEngineBaseModule):
    """softmax(Q K^T * scale + bias) V.

    Context parallelism: queries stay, K and V are gathered over `cp_group` in the zigzag layout whatever
    `cp_comm_type` says, which gives the same result as TE's ring.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        name: str | None = None,
    ):
        super().__init__(name)
        if return_max_logit:
            raise NotImplementedError("return_max_logit is not in the stand-in: set --qk_clip false.")
        if softcap:
            raise NotImplementedError("softcap is not in the stand-in: its scores are never capped.")
        if softmax_type not in ("vanilla", "off-by-one", "learnable"):
            raise ValueError(f"softmax_type {softmax_type!r} is not 'vanilla', 'off-by-one' or 'learnable'.")
        self.tp_size = collectives.world_size(tp_group) if tp_group is not None else tp_size
        self.set_tensor_parallel_group(tp_group)
        self.qkv_format = qkv_format
        self.attn_mask_type = attn_mask_type
        self.window_size = window_size
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.num_gqa_groups_per_partition = self.num_gqa_groups // self.tp_size
        self.layer_number = layer_number or 1
        self.attention_type = attention_type
        self.attention_dropout = attention_dropout
        key_channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.hidden_size_per_attention_head_k = key_channels
        self.hidden_size_per_attention_head_v = kv_channels if isinstance(kv_channels, int) else kv_channels[1]
        self.softmax_scale = key_channels**-0.5 if softmax_scale is None else softmax_scale
        self.softmax_type = softmax_type
        self.softmax_offset = None
        if softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(num_attention_heads // self.tp_size, device=resolve_device(None))
        elif softmax_type == "learnable":
            offset = torch.zeros(num_attention_heads // self.tp_size, device=resolve_device(None))
            self.softmax_offset = torch.nn.Parameter(offset)
        # Under sequence parallelism TE draws attention dropout from the default state, else from the
        # tracker's.
        self.get_rng_state_tracker = None if sequence_parallel else get_rng_state_tracker
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.register_load_state_dict_post_hook(_miss_no_extra_state)

    def set_context_parallel_group(self, cp_group, cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p") -> None:
        if isinstance(cp_group, (list, tuple)):
            raise NotImplementedError(
                f"cp_comm_type {cp_comm_type!r} with hierarchical groups is not in the stand-in: use 'p2p'."
            )
        self.cp_group = cp_group
        self.cp_global_ranks = cp_global_ranks
        self.cp_stream = cp_stream
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask=None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params=None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool = False,
        bf16_backward: bool = False,
        num_splits: int | None = 1,
    ) -> torch.Tensor:
        """Attention of one batch.

        Args:
            query_layer, key_layer, value_layer: [S, B, heads, D] ("sbhd"), [B, S, heads, D] ("bshd") or
                [T, heads, D] ("thd"); G divides N. Under context parallelism this rank's zigzag part.
            attention_mask: only read for padding and arbitrary mask types; True hides. For
                "arbitrary" it broadcasts to [B, N, Q, K].
            cu_seqlens_q, cu_seqlens_kv: [sequences + 1] bounds of the true lengths, over all CP ranks; thd.
            cu_seqlens_q_padded, cu_seqlens_kv_padded: bounds with paddings, where they differ. Rows outside
                the true lengths come out as zeros.

        Returns:
            [S, B, N*D], [B, S, N*D] or [T, N*D].
        """
        if inference_params is not None or alibi_slopes is not None or core_attention_bias_type == "alibi":
            raise NotImplementedError("inference_params and alibi are not in the attention stand-in.")
        if softcap or bf16_backward:
            raise NotImplementedError("softcap and bf16_backward are not in the attention stand-in.")
        mask_type = (attn_mask_type or self.attn_mask_type).replace(",", "_")
        mask_type = "padding_causal" if mask_type == "causal_padding" else mask_type
        if mask_type not in _MASK_TYPES:
            raise ValueError(f"attn_mask_type {mask_type!r} is not one of {_MASK_TYPES}.")
        bias = (core_attention_bias_type, core_attention_bias)
        window = window_size or self.window_size or (-1, -1)
        layout = qkv_format or self.qkv_format
        if layout == "thd":
            kv_true = cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
            return self._packed(
                (query_layer, key_layer, value_layer),
                mask_type,
                window,
                cu_seqlens_q,
                kv_true,
                cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded,
                kv_true if cu_seqlens_kv_padded is None else cu_seqlens_kv_padded,
            )
        if layout not in ("sbhd", "bshd"):
            raise ValueError(f"qkv_format {layout!r} is not one of 'sbhd', 'bshd', 'thd'.")
        q, k, v = query_layer, key_layer, value_layer
        if layout == "bshd":
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        out = self._padded((q, k, v), attention_mask, mask_type, window, (cu_seqlens_q, cu_seqlens_kv), bias)
        return out if layout == "sbhd" else out.transpose(0, 1)

    # ------------------------------------------------------------------------------------------ layouts

    def _padded(self, qkv, attention_mask, mask_type, window, cu_seqlens, bias):
        """sbhd, on this rank: [Q, B, N, D] x [K, B, G, D] -> [Q, B, N*D]."""
        q, k, v = (_wide(x) for x in qkv)
        cp_size, cp_rank = collectives.world_size(self.cp_group), collectives.rank(self.cp_group)
        if cp_size > 1:
            if mask_type in ("padding", "padding_causal", "arbitrary") and attention_mask is not None:
                raise NotImplementedError(
                    f"attn_mask_type {mask_type!r} with a mask under context parallelism, in sbhd: TE "
                    "refuses it too. Use padding-free batches, or a causal mask."
                )
            whole = k.shape[0] * cp_size
            q_positions = zigzag_positions(q.shape[0] * cp_size, cp_size, cp_rank).to(q.device)
            k, v = gather_sequence(k, [whole], self.cp_group), gather_sequence(v, [whole], self.cp_group)
        else:
            q_positions = torch.arange(q.shape[0], device=q.device)
        k_positions = torch.arange(k.shape[0], device=q.device)
        if mask_type.endswith("bottom_right"):
            q_positions = q_positions + k.shape[0] - q.shape[0] * cp_size

        hidden = torch.zeros(1, 1, q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
        if "causal" in mask_type:
            hidden = hidden | masks.causal(q_positions, k_positions)
        if window != (-1, -1):
            hidden = hidden | masks.outside_window(q_positions, k_positions, window)
        if mask_type == "arbitrary":
            hidden = hidden | attention_mask
        elif "padding" in mask_type:
            padded_BQ, padded_BK = masks.padding_of(
                attention_mask, *cu_seqlens, q.shape[0], k.shape[0], device=q.device
            )
            hidden = hidden | padded_BQ[:, None, :, None] | padded_BK[:, None, None, :]
        out = self._attend(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3), hidden, bias)
        return out.permute(2, 0, 1, 3).flatten(2).to(qkv[0].dtype)

    def _packed(self, qkv, mask_type, window, q_true, kv_true, q_padded, kv_padded):
        """thd, on this rank: [T, N, D] x [T, G, D] -> [T, N*D], sequence by sequence."""
        if mask_type == "arbitrary":
            raise NotImplementedError("attn_mask_type 'arbitrary' has no meaning for packed (thd) batches.")
        if q_true is None:
            raise ValueError("packed (thd) attention needs cu_seqlens_q; it is None.")
        q, k, v = (_wide(x) for x in qkv)
        cp_size, cp_rank = collectives.world_size(self.cp_group), collectives.rank(self.cp_group)
        q_bounds, kv_bounds = q_padded.tolist(), kv_padded.tolist()
        q_lengths, kv_lengths = q_true.diff().tolist(), kv_true.diff().tolist()
        if cp_size > 1:
            blocks = [end - start for start, end in itertools.pairwise(kv_bounds)]
            rows = kv_bounds[-1] // cp_size  # what follows on this rank is padding of the pack
            k = gather_sequence(k[:rows], blocks, self.cp_group)
            v = gather_sequence(v[:rows], blocks, self.cp_group)

        outputs, written = [], 0
        for i in range(len(q_lengths)):
            block = q_bounds[i + 1] - q_bounds[i]
            positions = zigzag_positions(block, cp_size, cp_rank).to(q.device)
            rows = slice(q_bounds[i] // cp_size, q_bounds[i + 1] // cp_size)
            keys = slice(kv_bounds[i], kv_bounds[i] + kv_lengths[i])
            k_positions = torch.arange(kv_lengths[i], device=q.device)
            hidden = (positions >= q_lengths[i])[:, None].expand(-1, kv_lengths[i])
            shift = kv_lengths[i] - q_lengths[i] if mask_type.endswith("bottom_right") else 0
            if "causal" in mask_type:
                hidden = hidden | masks.causal(positions + shift, k_positions)
            if window != (-1, -1):
                hidden = hidden | masks.outside_window(positions + shift, k_positions, window)
            heads_first = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            out = self._attend(*heads_first, hidden[None, None], ("no_bias", None))
            outputs.append(out[0].transpose(0, 1).flatten(1))
            written = rows.stop
        if written < q.shape[0]:
            outputs.append(q.new_zeros(q.shape[0] - written, q.shape[1] * v.shape[2]))
        return torch.cat(outputs).to(qkv[0].dtype)

    # -------------------------------------------------------------------------------------------- mathematics

    def _attend(self, q, k, v, hidden, bias):
        """q [B, N, Q, D], k and v [B, G, K, D], hidden broadcasting to [B, N, Q, K] -> [B, N, Q, D].

        A query that sees no key gives zeros.
        """
        heads_per_group = q.shape[1] // k.shape[1]
        if heads_per_group > 1:
            k, v = k.repeat_interleave(heads_per_group, 1), v.repeat_interleave(heads_per_group, 1)
        scores = q @ k.transpose(-1, -2)
        bias_type, bias_tensor = bias
        if bias_type == "pre_scale_bias":
            scores = scores + bias_tensor
        scores = scores * self.softmax_scale
        if bias_type == "post_scale_bias":
            scores = scores + bias_tensor
        blind = hidden.all(-1, keepdim=True)
        # Finite, so that a blind row's softmax and its gradient are finite before they are multiplied by 0.
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if self.softmax_offset is None:
            weights = scores.softmax(-1)
        else:
            sink = self.softmax_offset.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        weights = weights.masked_fill(blind, 0.0)
        if self.attention_dropout > 0.0 and self.training:
            tracker = self.get_rng_state_tracker
            with tracker().fork() if tracker is not None else nullcontext():
                weights = F.dropout(weights, self.attention_dropout)
        return weights @ v


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
