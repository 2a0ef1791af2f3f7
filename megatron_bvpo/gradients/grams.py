"""The Gram matrices of one probe. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bvpo.gradients.alpha import Moments

Matrix = tuple[tuple[float, ...], ...]


def pairs_of(names: Sequence) -> list[tuple]:
    """Each two of `names`, each with itself first: the upper triangle, row by row."""
    return list(itertools.combinations_with_replacement(names, 2))


@dataclass(frozen=True)
class Grams:
    """One probe: unbiased measurements of C and D in squared gradient units (gradients/moments.py).

    Attributes:
        streams: k names; the first one is the best-centred stream.
        C: [k, k], symmetric.
        D: [k − 1, k − 1], symmetric, of the streams but the first.
    """

    streams: tuple[str, ...]
    C: Matrix
    D: Matrix

    @classmethod
    def of_triangles(cls, streams: Sequence[str], C: Sequence[float], D: Sequence[float]) -> Grams:
        """From the upper triangles, row by row."""
        return cls(tuple(streams), _symmetric(len(streams), C), _symmetric(len(streams) - 1, D))

    def triangles(self) -> tuple[list[float], list[float]]:
        """Upper triangles of C and of D."""
        return _triangle(self.C), _triangle(self.D)

    def moments(self) -> Moments:
        """D, X, W and V_t of two streams, as the estimator of alpha takes them."""
        (noise, covariance), (_, other) = self.C
        # Where halves hold other shares of the streams' rows the factors differ, and W is no square: not below 0.
        W = max(noise + other - 2 * covariance, 0.0)
        return Moments(D=self.D[0][0], X=noise - covariance, W=W, V_t=noise)


def _symmetric(size: int, triangle: Sequence[float]) -> Matrix:
    found = dict(zip(pairs_of(range(size)), triangle, strict=True))
    return tuple(tuple(found[min(i, j), max(i, j)] for j in range(size)) for i in range(size))


def _triangle(matrix: Matrix) -> list[float]:
    return [matrix[i][j] for i, j in pairs_of(range(len(matrix)))]
