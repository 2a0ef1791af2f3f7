"""D, X and W of the two streams' gradients, from two halves of a batch.

MATH.md §3. With the finalised mean gradients g_sh of stream s ∈ {t, e} over half h ∈ {A, B},
ḡ_s = Σ_h n_sh·g_sh / n_s, δ_s = g_sA − g_sB and c_s = n_sA·n_sB / n_s²:

    D̂ = ‖ḡ_t − ḡ_e‖²    V̂_t = c_t·‖δ_t‖²    V̂_e = c_e·‖δ_e‖²    Ĉ = c_te·⟨δ_t, δ_e⟩
    X̂ = V̂_t − Ĉ          Ŵ = V̂_t + V̂_e − 2Ĉ

D̂, X̂ and Ŵ are unbiased for D = E‖g_t − g_e‖², X = V_t − C and W = V_t + V_e − 2C of the batch-mean gradient.
The halves are the same rows for both streams, but a row may have lost one of its pairs, or have come with an empty
pair alone. Of n_te,h rows in half h with both pairs, each with the covariance κ of its two gradients, the halves'
differences have the covariance κ·Σ_h n_te,h / (n_th·n_eh) and the batch's means κ·n_te / (n_t·n_e) (MATH.md §5):

    c_te = [n_te / (n_t·n_e)] / Σ_h [n_te,h / (n_th·n_eh)]    (n_te = 0: Ĉ = 0)

which is c_t where every empty pair has its trace pair.

Why halves and not the data-parallel ranks' own gradients: an expert's gradient on a rank already mixes the
samples of its whole expert group, sequence-parallel and tied gradients are partial before finalisation, and
overlapped reduction hides the local ones. Finalised gradients of halves are right under every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bvpo.gradients.alpha import Moments
from megatron_bvpo.gradients.shards import Slice

# Elements a float64 copy is made of at a time: 32 MiB a copy.
CHUNK = 1 << 22


@dataclass(frozen=True)
class HalfCounts:
    """Pairs in each half of the global batch, for both streams, and rows that have both pairs."""

    trace: tuple[float, float]
    empty: tuple[float, float]
    both: tuple[float, float]

    @property
    def usable(self) -> bool:
        """Both halves hold pairs of both streams."""
        return all(n > 0 for n in (*self.trace, *self.empty))

    def fractions(self, stream: str) -> tuple[float, float]:
        """n_sA/n_s and n_sB/n_s."""
        a, b = getattr(self, stream)
        return a / (a + b), b / (a + b)

    @property
    def variance_factors(self) -> tuple[float, float]:
        """c_t and c_e."""
        return tuple(a * b / (a + b) ** 2 for a, b in (self.trace, self.empty))

    @property
    def covariance_factor(self) -> float:
        """c_te."""
        shared = sum(n / (t * e) for n, t, e in zip(self.both, self.trace, self.empty, strict=True))
        return sum(self.both) / (sum(self.trace) * sum(self.empty)) / shared if shared else 0.0


def measure(
    slices: Sequence[Slice],
    gradients: dict[tuple[str, str], Sequence[Tensor]],
    counts: HalfCounts,
    device: torch.device | int,
    group: dist.ProcessGroup | None = None,
) -> Moments:
    """Moments of the whole model from this rank's slices; the same on every rank of `group`.

    Args:
        slices: what this rank holds and counts.
        gradients: (stream, half) to that pass's finalised gradients, as `shards.take` gave them; streams are
            `trace` and `empty`, halves `A` and `B`.
        counts: pairs of each half.
        device: where the four sums are reduced.
        group: all ranks that train this model, whatever they hold of it: `ParallelGroups.world`. None: all of
            torch's ranks, which is the same where one process trains one model.

    One all-reduce of four float64 numbers. A slice that several ranks hold is divided by their number, so that
    dense and expert parameters, sharded or not, share one reduction.
    """
    local = torch.zeros(4, dtype=torch.float64, device=device)
    for i, s in enumerate(slices):
        for start, end in s.counted:
            for first in range(start, end, CHUNK):
                part = slice(first, min(first + CHUNK, end))
                g = {key: tensors[i][part].double() for key, tensors in gradients.items()}
                local += _sums(g, counts) / s.copies
    dist.all_reduce(local, group=group)
    return moments_of(local.tolist(), counts)


def moments_of(sums: Sequence[float], counts: HalfCounts) -> Moments:
    """Moments from the whole model's four sums (`_sums`)."""
    d, tt, te, ee = sums
    c_t, c_e = counts.variance_factors
    noise, covariance = c_t * tt, counts.covariance_factor * te
    # Where halves hold other shares of the streams' pairs the factors differ, and W is no square: not let below 0.
    return Moments(D=d, X=noise - covariance, W=max(noise + c_e * ee - 2 * covariance, 0.0), V_t=noise)


def _sums(g: dict[tuple[str, str], Tensor], counts: HalfCounts) -> Tensor:
    """‖ḡ_t − ḡ_e‖², and with δ_s = g_sA − g_sB: ‖δ_t‖², ⟨δ_t, δ_e⟩ and ‖δ_e‖², of one part."""
    (t_a, t_b), (e_a, e_b) = counts.fractions("trace"), counts.fractions("empty")
    mean = t_a * g["trace", "A"] + t_b * g["trace", "B"] - e_a * g["empty", "A"] - e_b * g["empty", "B"]
    trace = g["trace", "A"] - g["trace", "B"]
    empty = g["empty", "A"] - g["empty", "B"]
    return torch.stack([mean.dot(mean), trace.dot(trace), trace.dot(empty), empty.dot(empty)])
