"""Where TE keeps Float8Tensor."""

from . import Float8Tensor

__all__ = ["Float8Tensor"]
