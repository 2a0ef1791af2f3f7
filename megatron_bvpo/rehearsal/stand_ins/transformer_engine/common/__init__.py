"""Framework-independent names of Transformer Engine: the quantization recipes."""

from . import recipe

__all__ = ["recipe"]
