"""Where TE keeps NVFP4Tensor."""

from . import NVFP4Tensor

__all__ = ["NVFP4Tensor"]
