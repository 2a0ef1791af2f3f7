"""How long data-parallel replicas wait for each other because their micro-batches differ in length.

In a mixture of experts every all-to-all joins the replicas of an expert group: each micro-batch takes them as long as
the longest of theirs. All replicas meet once a step, at the gradients. What is predicted here takes time as
proportional to tokens, and micro-batches as independent draws; the pipeline's own waiting is the bubble. Nobody has
timed it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bvpo.planning.layout import Groups

# Coefficient of variation of a row's tokens where no rows are given: an example, not a measurement.
EXAMPLE_CV = 0.5
# Items that ms-swift packs at a time (swift/dataset/packing.py).
PACKED_TOGETHER = 1000
# Steps that are drawn; the seed is fixed, so that a plan says the same each time.
DRAWS, SEED = 1000, 0


@dataclass(frozen=True)
class Waiting:
    """Predicted shares of a step in which a replica waits for longer micro-batches of others.

    Attributes:
        together: replicas that meet in every micro-batch.
        cv: coefficient of variation of a row's tokens.
        rows: how many rows were measured; 0: `cv` is an example.
        single: with one row a micro-batch.
        packed: with packs of `packing_length`; None without rows.
        packing_length: tokens a pack, proposed for these rows.
        rows_a_pack: on average.
        packs_cv: coefficient of variation of a pack's tokens.
    """

    together: int
    cv: float
    rows: int
    single: float
    packed: float | None = None
    packing_length: int | None = None
    rows_a_pack: float | None = None
    packs_cv: float | None = None


def replicas_together(groups: Groups) -> int:
    """Data-parallel replicas whose tokens go through one all-to-all; 1 for a dense model."""
    inside = groups.ep * groups.etp / (groups.tp * groups.cp)
    return max(1, min(groups.dp, math.ceil(inside))) if groups.ep > 1 else 1


def waiting_share(sizes: Sequence[float], *, micro_batches: int, dp: int, together: int) -> float:
    """The share of a step in which a replica waits, for micro-batches drawn from `sizes`."""
    draw = random.Random(SEED)
    work = time = 0.0
    groups = max(dp // together, 1)
    for _ in range(DRAWS):
        slowest = 0.0
        for _ in range(groups):
            spent = 0.0
            for _ in range(micro_batches):
                drawn = draw.choices(sizes, k=together)
                spent += max(drawn)
                work += sum(drawn)
            slowest = max(slowest, spent)
        time += slowest
    return 1 - work / (groups * together * time)


def variation(sizes: Sequence[float]) -> float:
    mean = sum(sizes) / len(sizes)
    return math.sqrt(sum((size - mean) ** 2 for size in sizes) / len(sizes)) / mean


def packs_of(sizes: Sequence[int], length: int) -> list[int]:
    """Tokens of the packs that rows make: the longest first, each into the fullest pack that takes it."""
    packs: list[int] = []
    for start in range(0, len(sizes), PACKED_TOGETHER):
        open_packs: list[int] = []
        for size in sorted(sizes[start : start + PACKED_TOGETHER], reverse=True):
            room = [i for i, filled in enumerate(open_packs) if filled + size <= length]
            if room:
                open_packs[max(room, key=open_packs.__getitem__)] += size
            else:
                open_packs.append(size)
        packs += open_packs
    return packs


def example_sizes() -> list[float]:
    """Row sizes of mean 1 and EXAMPLE_CV, spread as logarithms of a normal distribution."""
    draw, sigma = random.Random(SEED), math.sqrt(math.log(1 + EXAMPLE_CV**2))
    return [draw.lognormvariate(-(sigma**2) / 2, sigma) for _ in range(4000)]


def predict(groups: Groups, micro_batches: int, rows: Sequence[int] | None, longest: int) -> Waiting | None:
    """The waiting of a layout; None where there is nobody to wait for.

    Args:
        rows: tokens of each row, all its sequences together; None: an example.
        longest: tokens of the longest pack that fits the GPUs.
    """
    if groups.dp == 1:
        return None
    together = replicas_together(groups)
    at = {"micro_batches": micro_batches, "dp": groups.dp, "together": together}
    if not rows:
        sizes = example_sizes()
        return Waiting(together, EXAMPLE_CV, 0, waiting_share(sizes, **at))
    length = min(-(-max(rows) // 64) * 64, max(longest, 64))
    packs = packs_of(rows, length)
    return Waiting(
        together=together,
        cv=variation(rows),
        rows=len(rows),
        single=waiting_share(rows, **at),
        packed=waiting_share(packs, **at),
        packing_length=length,
        rows_a_pack=len(rows) / len(packs),
        packs_cv=variation(packs),
    )
