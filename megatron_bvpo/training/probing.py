"""Probe steps: where alpha comes from. The estimator is gradients/alpha.py; here it meets Megatron's passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from swift.utils import get_current_device, get_logger

from megatron_bvpo.data.batches import ITEMS_KEY, WEIGHT_KEY
from megatron_bvpo.gradients import shards
from megatron_bvpo.gradients.alpha import Moments
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.gradients.halves import HALVES, can_split, half_of_items, rows_of_pass
from megatron_bvpo.gradients.moments import StreamCounts, measure_grams
from megatron_bvpo.host.router import (
    clear_expert_counters,
    has_router_losses,
    router_at_rest,
)
from megatron_bvpo.objective.streams import STREAMS
from megatron_bvpo.streams import kept_shards
from megatron_bvpo.training.mixture import FIRST_PROBES, Mixture
from megatron_bvpo.training.passes import NOTHING, Pass, Passes

logger = get_logger()


@dataclass
class Probe:
    """How a step is measured: each micro-batch item's half, and how many pairs the halves hold."""

    halves: list[list[str]]
    counts: StreamCounts
    split: bool


class Probes:
    """Measures a step's gradients by stream and half, and leaves their mixture in Megatron's buffers.

    Args:
        mixture: what is learnt, and with what a step is mixed.
        passes: run the micro-batches.
        models: this rank's wrapped model chunks.
        groups: process groups.
        router_configs: configurations of the model's routers.
        collate: rows → a micro-batch.
        zero_gradients: clears Megatron's buffers.
        interval: steps between two probes.
        virtual: the pipeline has virtual stages.
    """

    def __init__(
        self,
        mixture: Mixture,
        passes: Passes,
        models: list,
        groups: ParallelGroups,
        *,
        router_configs: list,
        collate: Callable,
        zero_gradients: Callable[[], None],
        interval: int,
        virtual: bool,
    ):
        self.mixture, self.passes, self.models, self.groups = mixture, passes, models, groups
        self.router_configs, self.collate, self.zero_gradients = router_configs, collate, zero_gradients
        self.interval, self.virtual = interval, virtual

    def plan(self, batches: list[dict], iteration: int) -> Probe | None:
        """The halves of the step behind `iteration`, or None: no probe, or the batch is too small to be halved."""
        if self.mixture.estimator is None or (iteration >= FIRST_PROBES and iteration % self.interval):
            return None
        items = [batch[ITEMS_KEY] for batch in batches]
        # The last batch of a stream can be short, and on one rank only.
        uneven = len({len(batch) for batch in items}) > 1
        if self.groups.any_rank(uneven, get_current_device()):
            return None
        halves = half_of_items(len(items), len(items[0]), rank=self.groups.dp_rank, ranks=self.groups.dp_size)
        counts = self._count_halves(items, halves)
        if not counts.usable:
            trace, empty = counts.members.values()
            logger.warning_once(
                f"Step {iteration + 1} cannot be a probe: its halves hold {trace} trace and {empty} "
                f"empty pairs, and each needs one at least. alpha stays at {self.mixture.alpha:.2f} on such steps; a "
                "larger --global_batch_size helps.",
                hash_id="bvpo_no_probe",
            )
            return None
        return Probe(halves, counts, split=can_split(len(items), pipeline=self.groups.pp_size, virtual=self.virtual))

    def _count_halves(self, items: list[list], halves: list[list[str]]) -> StreamCounts:
        counts = torch.zeros(len(STREAMS) + 1, len(HALVES), dtype=torch.float64, device=get_current_device())
        for batch, sides in zip(items, halves, strict=True):
            for item, side in zip(batch, sides, strict=True):
                for row in item if isinstance(item, list) else [item]:
                    has = [key in row for key in ("chosen_input_ids", "empty_chosen_input_ids")]
                    counts[:, HALVES.index(side)] += row.get(WEIGHT_KEY, 1.0) * counts.new_tensor([*has, all(has)])
        dist.all_reduce(counts, group=self.groups.dp)
        trace, empty, both = map(tuple, counts.tolist())
        return StreamCounts({"trace": trace, "empty": empty}, {("trace", "empty"): both})

    def run(self, chunks: list[list[dict]], probe: Probe) -> tuple[Pass, Moments]:
        """Stream × half, their finalised gradients kept apart, measured, and mixed with the weights as they are."""
        slices = shards.gradient_slices(self.models, tp_rank=self.groups.tp_rank)
        router_losses = has_router_losses(self.router_configs)
        gradients, passes = {}, []
        with router_at_rest(self.router_configs):
            for stream in STREAMS:
                for half, n in zip(HALVES, probe.counts.members[stream], strict=True):
                    self.zero_gradients()
                    parts = [self._batches_of_pass(batches, probe, stream, half) for batches in chunks]
                    passes.append(self.passes.run(parts, {**NOTHING, stream: 1 / n}, forward_only=False))
                    last = len(passes) == len(STREAMS) * len(HALVES)
                    stays = last and not router_losses
                    gradients[stream, half] = [s.grad_E for s in slices] if stays else shards.take(slices)

        grams = measure_grams(slices, gradients, probe.counts, get_current_device(), self.groups.world)
        moments = grams.moments()
        weights = self._weights_of_passes(probe.counts)
        kept = kept_shards(STREAMS, router_losses=router_losses)
        own = weights.pop(("empty", "B")) if not router_losses else 1.0
        if router_losses:
            # They enter the update once, as a one-pass step has them: from both streams' tokens together.
            clear_expert_counters(self.models)
            self.zero_gradients()
            self.passes.run(chunks, forward_only=False)
        shards.mix_in(slices, own, [(weight, gradients[key]) for key, weight in weights.items()])
        held = sum(s.grad_E.numel() * s.grad_E.element_size() for s in slices) * kept / 2**30
        logger.info_once(f"A probe keeps {kept} copies of this rank's gradient shard: {held:.2f} GiB.", "bvpo_kept")
        return _joined(passes), moments

    def _weights_of_passes(self, counts: StreamCounts) -> dict[tuple[str, str], float]:
        """What each pass's mean gradient counts in the update: its stream's weight, times the half's share of pairs."""
        return {
            (stream, half): weight * fraction
            for stream, weight in self.mixture.weights.items()
            for half, fraction in zip(HALVES, counts.fractions(stream), strict=True)
        }

    def _batches_of_pass(self, batches: list[dict], probe: Probe, stream: str, half: str) -> list[dict]:
        items = [batch[ITEMS_KEY] for batch in batches]
        rows = rows_of_pass(items, probe.halves, stream, half, split=probe.split)
        return [self.collate(batch) for batch in rows]


def _joined(passes: list[Pass]) -> Pass:
    """What the passes of one step found, as if they were one."""
    whole = Pass(NOTHING, 1.0, [row for done in passes for row in done.bad_rows])
    sums = [done.sums for done in passes]
    whole.sums = None if sums[0] is None else sum(sums)
    return whole
