"""Where TE keeps DotProductAttention."""

from . import utils
from .layer import DotProductAttention

__all__ = ["DotProductAttention", "utils"]
