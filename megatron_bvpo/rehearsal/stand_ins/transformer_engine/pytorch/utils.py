"""Splitting along a dimension, under the name Megatron's QKV projection calls."""

from __future__ import annotations

import torch


class SplitAlongDim(torch.autograd.Function):
    """`torch.split` as an autograd function whose backward concatenates."""

    @staticmethod
    def forward(ctx, mixed, split_dim, split_size_or_sections, squeeze=False):
        ctx.split_dim = split_dim
        ctx.squeeze = squeeze
        parts = torch.split(mixed, split_size_or_sections, dim=split_dim)
        if squeeze:
            parts = tuple(part.squeeze(split_dim) for part in parts)
        return tuple(part.clone() for part in parts)

    @staticmethod
    def backward(ctx, *grads):
        if ctx.squeeze:
            grads = [grad.unsqueeze(ctx.split_dim) for grad in grads]
        return torch.cat(grads, dim=ctx.split_dim), None, None, None
