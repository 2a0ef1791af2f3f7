"""Target log-probs in place of the whole logits, at the model's last stage.

mcore-bridge's `_postprocess` calls `_forward_output_layer(hidden, weight=…)` and hands what that returns
to `compute_language_model_loss(labels, logits)`. Between the two live the [S, B, V] logits. On the models
of a BVPO run the first returns the hidden states unchanged, and the second computes the target log-probs
from them. Both are replaced on the model object, so other models in the process keep theirs. A model that
mcore-bridge builds as multimodal (Qwen3.5 and later, also for text alone) has its language model, and with it
the head, at `.language_model`.

Shapes: S sequence on this rank (a tensor-parallel chunk of it under sequence parallelism), B batch, H
hidden, V this rank's vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from swift.utils import get_logger

from megatron_bvpo.kernels import target_logps, vocabulary_shard
from megatron_bvpo.kernels.tensor_parallel import TensorParallel

logger = get_logger()


@dataclass
class HiddenForHead:
    """What the output layer would have been given."""

    hidden_SBH: torch.Tensor
    weight_VH: torch.Tensor


def why_not_plain(model) -> str | None:
    """Reason why the head of this model (of its language model) is more than a matrix product, or None."""
    from mcore_bridge.model.gpt_model import GPTModel

    kind = type(model)
    head = getattr(model, "output_layer", None)
    if type(head) is not ColumnParallelLinear:
        return f"its output layer is a {type(head).__name__}"
    if head.bias is not None:
        return "its output layer has a bias"
    # Asked for gently: a model with another backbone may lack either.
    if getattr(kind, "_forward_output_layer", None) is not GPTModel._forward_output_layer:
        return "it computes its logits in its own way"
    if getattr(kind, "compute_language_model_loss", None) is not LanguageModule.compute_language_model_loss:
        return "it computes its loss in its own way"
    if getattr(model.config, "use_mup", False) or getattr(model, "mtp_process", False):
        return "it scales its logits or predicts several tokens"
    return None


def install_fused_head(model, *, impl: str, vocab_size: int, memory_gib: float) -> None:
    """Replace both methods on `model` (one unwrapped chunk) if it is a last stage with a plain head.

    Args:
        model: a `GPTModel`, or one that holds it as `language_model`.
        impl: `auto`, `fused`, `triton` or `torch`; `te` keeps the stock path.
        vocab_size: real vocabulary rows; padding rows take no part in the softmax.
        memory_gib: what a tile of logits may take on a GPU. Not what happens to be free: a resumed run must cut
            the same tiles as the one that it goes on.
    """
    if not model.post_process or impl == "te":
        return
    model = getattr(model, "language_model", model)
    reason = why_not_plain(model)
    if reason is not None:
        logger.warning(f"Log-probs come from whole logits: {type(model).__name__} has no plain head ({reason}).")
        return
    head = model.output_layer
    shard = None

    def forward_output_layer(hidden_SBH, weight=None, runtime_gather_output=None):
        # The head's own forward is not called, so its hooks must be: with overlapped parameter gathering
        # they wait for its weight.
        for hook in head._forward_pre_hooks.values():
            hook(head, (hidden_SBH,))
        return HiddenForHead(hidden_SBH, head.weight if weight is None else weight)

    def compute_language_model_loss(labels_BS, found: HiddenForHead):
        nonlocal shard
        hidden_SBH = found.hidden_SBH
        targets_N = labels_BS.transpose(0, 1).reshape(-1)
        tp = TensorParallel(head.tp_group if head.tp_group.size() > 1 else None, head.sequence_parallel)
        logps_N = target_logps(
            hidden_SBH.reshape(-1, hidden_SBH.shape[-1]),
            found.weight_VH,
            targets_N,
            tp_group=tp.group,
            sequence_parallel=tp.sequence_parallel,
            impl=impl,
            vocab_size=vocab_size,
            shard=shard,
            budget_bytes=int(memory_gib * 2**30),
        )
        if shard is None:  # that call checked everything, and waited for the ranks to tell their sizes
            shard = vocabulary_shard(found.weight_VH, targets_N, tp_group=tp.group, vocab_size=vocab_size)
        return -logps_N.view(labels_BS.shape[1], labels_BS.shape[0]).transpose(0, 1)

    model._forward_output_layer = forward_output_layer
    model.compute_language_model_loss = compute_language_model_loss
