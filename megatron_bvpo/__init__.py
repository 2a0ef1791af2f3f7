"""BVPO for ms-swift's Megatron backend.

Importing this package loads nothing else: the `swift` route and the kernels rely on that.
"""

__version__ = "0.1.0"
