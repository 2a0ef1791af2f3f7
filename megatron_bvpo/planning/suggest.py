"""A search over layouts and recomputation: what fits, fastest first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_bvpo.planning.costs import Costs, recomputed_share, step_costs
from megatron_bvpo.planning.layout import Cluster, candidate_layouts
from megatron_bvpo.planning.memory import GIB, Lengths, fullest, least_recomputed, longest_trace
from megatron_bvpo.planning.model_shapes import ModelShape
from megatron_bvpo.planning.settings import RunSettings

# Share of a GPU that a suggestion leaves free: experts are never loaded evenly, and the allowances are guesses.
HEADROOM = 0.10
# Tokens of the busiest expert rank over the mean that a proposal must bear.
BUSIEST = 2.0
BLOCK = dict(recompute_granularity="full", recompute_method="block")  # as few layers as fit
RECOMPUTE = (
    dict(recompute_granularity="none", recompute_method=None, recompute_num_layers=None),
    dict(recompute_granularity="selective", recompute_method=None, recompute_num_layers=None),
    BLOCK,
    dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
)


@dataclass(frozen=True)
class Suggestion:
    """One layout with its recomputation.

    Attributes:
        bytes: on the fullest GPU.
        fits: within the GPU's memory, HEADROOM left free.
        longest: longest trace that fits; 0 where it was not asked for.
    """

    run: RunSettings
    bytes: float
    fits: bool
    costs: Costs
    longest: int = 0

    @property
    def middle_seconds(self) -> float:
        return sum(self.costs.seconds) / 2


def fewer_recomputed(
    shape: ModelShape, run: RunSettings, cluster: Cluster, lengths: Lengths, imbalance: float
) -> RunSettings | None:
    """The run with as few recomputed layers as leave HEADROOM free, with twice the mean tokens on the busiest expert
    rank; None where that is not fewer than it has.
    """
    if run.recompute != "full" or run.rehearsal:
        return None
    load = max(imbalance, BUSIEST if shape.experts else 1.0)
    room = (1 - HEADROOM) * cluster.memory * GIB
    found = least_recomputed(shape, run, cluster.ranks, lengths, room, load)
    fewer = found is not None and recomputed_share(shape, found) < recomputed_share(shape, run)
    return found if fewer else None


def suggestions(
    shape: ModelShape,
    run: RunSettings,
    cluster: Cluster,
    lengths: Lengths,
    count: int = 10,
    imbalance: float = 1.0,
) -> list[Suggestion]:
    """The best layouts: those that fit, by the middle of their range of seconds, then the smallest of the others.

    Args:
        imbalance: tokens of the busiest expert rank over the mean.
    """
    found = []
    for layout in candidate_layouts(run, shape, cluster):
        for mode in RECOMPUTE:
            tried = dataclasses.replace(layout, **mode)
            if mode is BLOCK:
                room = (1 - HEADROOM) * cluster.memory * GIB
                tried = least_recomputed(shape, layout, cluster.ranks, lengths, room, imbalance)
                if tried is None:
                    continue
            size = fullest(shape, tried, cluster.ranks, lengths, imbalance)
            fits = size <= (1 - HEADROOM) * cluster.memory * GIB
            found.append(Suggestion(tried, size, fits, step_costs(shape, tried, cluster, lengths)))
            if fits:
                break  # more recomputation only costs time
    fitting = sorted((s for s in found if s.fits), key=lambda s: s.middle_seconds)
    rest = sorted((s for s in found if not s.fits), key=lambda s: s.bytes)
    best = (fitting or rest)[:count]
    return [dataclasses.replace(s, longest=longest_trace(shape, s.run, cluster, lengths, imbalance)) for s in best]
