"""Where TE keeps MXFP8Tensor."""

from . import MXFP8Tensor

__all__ = ["MXFP8Tensor"]
