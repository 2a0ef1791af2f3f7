"""Splitting along a dimension, under the name Megatron's QKV projection calls."""

from __future__ import annotations

import torch


class SplitAlongDim(torch.autograd.Function):
    """`torch.split` as an autograd function whose backward concatenates."""

    @staticmethod
    def forward(ctx, mixed_x_layer, split_dim, split_size_or_sections, squeeze=False):
        ctx.split_dim = split_dim
        ctx.squeeze = squeeze
        parts = torch.split(mixed_x_layer, split_size_or_sections, dim=split_dim)
        if squeeze:
            parts = tuple(part.squeeze(split_dim) for part in parts)
        return tuple(part.clone() for part in parts)

    @staticmethod
    def backward(ctx, *grad_outputs):
        if ctx.squeeze:
            grad_outputs = [grad.unsqueeze(ctx.split_dim) for grad in grad_outputs]
        return torch.cat(grad_outputs, dim=ctx.split_dim), None, None, None
