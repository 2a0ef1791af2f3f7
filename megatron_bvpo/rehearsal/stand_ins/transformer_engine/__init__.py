"""Transformer Engine's public Python names, in plain PyTorch.

The layers that Megatron uses hold the real mathematics in the dtype of their parameters and on any device;
parameter attributes are those of TE 2.20, because Megatron's gradient norms and reductions depend on them.
FP8, user-buffer overlap and the fused MoE kernels are refused with a NotImplementedError that names the flag
to turn off. The version is TE's whose behaviour is copied; the local part says that this is not TE.
"""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.17.1+rehearsal"
