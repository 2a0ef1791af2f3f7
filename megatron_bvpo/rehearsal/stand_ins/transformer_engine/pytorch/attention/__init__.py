"""Attention and rotary embedding of the Transformer Engine stand-in."""

from ..utils import SplitAlongDim as _SplitAlongDim
from . import dot_product_attention, rope
from .dot_product_attention import DotProductAttention
from .rope import apply_rotary_pos_emb

__all__ = ["DotProductAttention", "_SplitAlongDim", "apply_rotary_pos_emb", "dot_product_attention", "rope"]
