"""The part of TE's operation API that Megatron can use without its fuser: the activations.

Gated activations split the last dimension in two: the first half goes through the activation and multiplies
the second half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class FusibleOperation(torch.nn.Module):
    """Base of TE's operations."""

    def __init__(self, *, cache_quantized_input: bool = False):
        super().__init__()
        if cache_quantized_input:
            raise NotImplementedError(
                "cache_quantized_input needs FP8, which the transformer_engine stand-in does not have. "
                "Leave activation_func_fp8_input_store false."
            )


class GELU(FusibleOperation):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class ReLU(FusibleOperation):
    def forward(self, x):
        return F.relu(x)


class SiLU(FusibleOperation):
    def forward(self, x):
        return F.silu(x)


class GEGLU(FusibleOperation):
    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * value


class ReGLU(FusibleOperation):
    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.relu(gate) * value


class SwiGLU(FusibleOperation):
    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Sequential(torch.nn.Module):
    """TE's op fuser; refused."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            "te.pytorch.ops.Sequential (the op fuser) is not in the transformer_engine stand-in. "
            "Set --use_transformer_engine_op_fuser false."
        )
