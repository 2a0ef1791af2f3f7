"""Where older TE releases kept Float8Tensor."""

from .tensor import Float8Tensor

__all__ = ["Float8Tensor"]
