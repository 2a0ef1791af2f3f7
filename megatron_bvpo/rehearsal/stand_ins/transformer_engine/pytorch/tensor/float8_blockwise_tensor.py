"""Where TE keeps Float8BlockwiseQTensor."""

from . import Float8BlockwiseQTensor

__all__ = ["Float8BlockwiseQTensor"]
