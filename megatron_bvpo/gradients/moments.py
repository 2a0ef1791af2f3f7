"""Gram matrices of k streams' gradients, from two halves of a batch (MATH.md §3 and §5).

With the finalised mean gradients g_jh of stream j = 1 … k over half h ∈ {A, B}, ḡ_j = Σ_h n_jh·g_jh / n_j and
δ_j = g_jA − g_jB:

    Ĉ_jk = c_jk·⟨δ_j, δ_k⟩          D̂_jk = ⟨ḡ_j − ḡ_1, ḡ_k − ḡ_1⟩

are unbiased for C_jk = tr Cov(g_j, g_k) and E⟨g_j − g_1, g_k − g_1⟩ of the batch-mean gradients.
The halves are the same rows for all streams, but a row may have lost one of its members, or have come with an empty
pair alone. Of n_jk,h rows in half h that both streams have, each with the covariance κ of its two gradients, the
halves' differences have the covariance κ·Σ_h n_jk,h / (n_jh·n_kh) and the batch's means κ·n_jk / (n_j·n_k):

    c_jk = [n_jk / (n_j·n_k)] / Σ_h [n_jk,h / (n_jh·n_kh)]    (n_jk = 0: Ĉ_jk = 0)

which is n_jA·n_jB / n_j² for j = k, and for all where every row has every member.

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

from megatron_bvpo.gradients.grams import Grams, pairs_of
from megatron_bvpo.gradients.shards import Slice

# Elements a float64 copy is made of at a time: 32 MiB a copy.
CHUNK = 1 << 22


@dataclass(frozen=True)
class StreamCounts:
    """Rows in each half, (A, B), of the global batch.

    Attributes:
        members: for each stream, rows that have it; the first stream is the one that the others are measured against.
        shared: for each two streams, (earlier, later), rows that have both.
    """

    members: dict[str, tuple[float, float]]
    shared: dict[tuple[str, str], tuple[float, float]]

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def usable(self) -> bool:
        """Both halves hold rows of every stream."""
        return all(n > 0 for halves in self.members.values() for n in halves)

    def fractions(self, stream: str) -> tuple[float, float]:
        """n_jA/n_j and n_jB/n_j."""
        a, b = self.members[stream]
        return a / (a + b), b / (a + b)

    def factor(self, one: str, other: str) -> float:
        """c_jk; `one` may be `other`, else it is the earlier stream."""
        if one == other:
            a, b = self.members[one]
            return a * b / (a + b) ** 2
        both, n, m = self.shared[one, other], self.members[one], self.members[other]
        apart = sum(k / (i * j) for k, i, j in zip(both, n, m, strict=True))
        return sum(both) / (sum(n) * sum(m)) / apart if apart else 0.0


def measure_grams(
    slices: Sequence[Slice],
    gradients: dict[tuple[str, str], Sequence[Tensor]],
    counts: StreamCounts,
    device: torch.device | int,
    group: dist.ProcessGroup | None = None,
) -> Grams:
    """Gram matrices of the whole model from this rank's slices; the same on every rank of `group`.

    Args:
        slices: what this rank holds and counts.
        gradients: (stream, half) to that pass's finalised gradients, as `shards.take` gave them; halves are `A`, `B`.
        counts: rows of each half, of the streams that are measured.
        device: where the sums are reduced.
        group: all ranks that train this model, whatever they hold of it: `ParallelGroups.world`. None: all of
            torch's ranks, which is the same where one process trains one model.

    One all-reduce of k² float64 numbers. A slice that several ranks hold is divided by their number, so that
    dense and expert parameters, sharded or not, share one reduction.
    """
    local = torch.zeros(len(counts.streams) ** 2, dtype=torch.float64, device=device)
    for i, s in enumerate(slices):
        for start, end in s.counted:
            for first in range(start, end, CHUNK):
                part = slice(first, min(first + CHUNK, end))
                g = {key: tensors[i][part].double() for key, tensors in gradients.items()}
                local += _sums(g, counts) / s.copies
    dist.all_reduce(local, group=group)
    return grams_of(local.tolist(), counts)


def grams_of(sums: Sequence[float], counts: StreamCounts) -> Grams:
    """Gram matrices from the whole model's sums (`_sums`)."""
    streams = counts.streams
    gaps = len(pairs_of(streams[1:]))
    noise = [counts.factor(*names) * value for names, value in zip(pairs_of(streams), sums[gaps:], strict=True)]
    return Grams.of_triangles(streams, noise, sums[:gaps])


def _sums(g: dict[tuple[str, str], Tensor], counts: StreamCounts) -> Tensor:
    """⟨ḡ_j − ḡ_1, ḡ_k − ḡ_1⟩ for 1 < j ≤ k, then ⟨δ_j, δ_k⟩ for j ≤ k, of one part."""
    first, *others = counts.streams
    a, b = counts.fractions(first)
    gap = {}
    for s in others:
        own_a, own_b = counts.fractions(s)
        gap[s] = a * g[first, "A"] + b * g[first, "B"] - own_a * g[s, "A"] - own_b * g[s, "B"]
    apart = {s: g[s, "A"] - g[s, "B"] for s in counts.streams}
    products = [gap[s].dot(gap[t]) for s, t in pairs_of(others)]
    return torch.stack(products + [apart[s].dot(apart[t]) for s, t in pairs_of(counts.streams)])
