"""What growing a model takes in memory: counted before anything is written, of what transport.py and new_layer.py hold.

A new layer is made matrix by matrix, so its largest moment counts and not the model's size: of a dense MLP the plan of
its neurons, of a mixture attention or one expert.
"""

from __future__ import annotations

from megatron_bvpo.growth.layers import Sizes
from megatron_bvpo.growth.transport import PROBES

GIB = 2**30
# Python with torch (its build for CPUs), scipy and POT at work, measured.
LIBRARIES = 0.34 * GIB
FLOAT = 4


def needed(sizes: Sizes, itemsize: int) -> int:
    """Bytes at the largest moment, the libraries left out.

    Args:
        itemsize: of an element in the model's files.
    """
    return max(
        _attention(sizes, itemsize), _behaviour(sizes, itemsize), *(_neurons(sizes, n, itemsize) for n in _mlps(sizes))
    )


def _mlps(sizes: Sizes) -> set[int]:
    return {neurons for _, neurons in sizes.mlps()}


def _reading(elements: int, itemsize: int) -> int:
    """A tensor in float32, and its bytes in the file's type while they are cast."""
    return elements * (FLOAT if itemsize == FLOAT else FLOAT + itemsize)


def _attention(sizes: Sizes, itemsize: int) -> int:
    """The output columns of both layers' heads, and the second one's matrix before its heads were put together."""
    matrix = sizes.hidden * sizes.heads * sizes.head_dim
    return max(3 * FLOAT * matrix, FLOAT * matrix + _reading(matrix, itemsize)) + 4 * FLOAT * sizes.heads**2


def _behaviour(sizes: Sizes, itemsize: int) -> int:
    """What the experts of both layers answer, and one expert."""
    if not sizes.experts:
        return 0
    answers = FLOAT * sizes.experts * PROBES * sizes.hidden
    matrix = sizes.ffn * sizes.hidden
    return max(3 * answers, 2 * answers + 2 * FLOAT * matrix + _reading(matrix, itemsize))


def _neurons(sizes: Sizes, neurons: int, itemsize: int) -> int:
    """Costs while two matrices are read, POT's five of the costs' size, and the plan at work."""
    square, matrix = FLOAT * neurons**2, neurons * sizes.hidden
    return max(square + FLOAT * matrix + _reading(matrix, itemsize), 5 * square)
