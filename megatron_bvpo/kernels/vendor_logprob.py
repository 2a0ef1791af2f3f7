"""The path to compare with: whole logits, and somebody else's vocabulary-parallel cross-entropy over them.

Holds [N, V] logits in the dtype of the hidden states, as the stock stack does. Which cross-entropy
(Transformer Engine's `parallel_cross_entropy`, Megatron's `vocab_parallel_cross_entropy`) is the caller's to
pass: nothing of those packages is imported here.

Shapes: N tokens of the sequence, L tokens of this rank, V this rank's vocabulary rows, padding included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_bvpo.kernels.tensor_parallel import TensorParallel

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class EnterVocabulary(torch.autograd.Function):
    """Hidden states as the head sees them; backward adds their gradients over the ranks. [L, H] → [N, H]"""

    @staticmethod
    def forward(ctx, hidden_LH, tp: TensorParallel):
        ctx.tp = tp
        x_NH = tp.gather_tokens(hidden_LH)
        return x_NH.view_as(x_NH) if x_NH is hidden_LH else x_NH

    @staticmethod
    def backward(ctx, grad_NH):
        return ctx.tp.sum_tokens(grad_NH.contiguous().clone()), None


def vendor_logps(hidden_LH, weight_VH, targets_N, *, tp, rows: int, ignore_index: int, cross_entropy: CrossEntropy):
    """-cross_entropy(logits_NV, targets_N) per token, float32, 0 for ignored targets. [N]"""
    logits_NV = EnterVocabulary.apply(hidden_LH, tp) @ weight_VH.T
    if rows < weight_VH.shape[0]:
        padding_V = torch.arange(weight_VH.shape[0], device=weight_VH.device) >= rows
        logits_NV = logits_NV.masked_fill(padding_V, torch.finfo(logits_NV.dtype).min)
    ignored_N = targets_N == ignore_index
    losses_N = cross_entropy(logits_NV, targets_N.masked_fill(ignored_N, 0))
    if losses_N.shape != targets_N.shape:
        raise ValueError(
            f"target_logps: cross_entropy returned shape {tuple(losses_N.shape)} for {targets_N.shape[0]} "
            "targets, expected one unreduced loss per target"
        )
    return -losses_N.float().masked_fill(ignored_N, 0)
