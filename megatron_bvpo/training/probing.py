"""Probe steps: where weights come from. The estimators are in gradients/; here they meet Megatron's passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from swift.utils import get_current_device, get_logger

from megatron_bvpo.data.batches import ITEMS_KEY, WEIGHT_KEY
from megatron_bvpo.data.encoded_rows import has_stream
from megatron_bvpo.gradients import shards
from megatron_bvpo.gradients.grams import Grams
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.gradients.halves import HALVES, can_split, half_of_items, rows_of_pass, some_streams
from megatron_bvpo.gradients.moments import StreamCounts, measure_grams
from megatron_bvpo.host.router import (
    clear_expert_counters,
    has_router_losses,
    router_at_rest,
)
from megatron_bvpo.training.mixture import FIRST_PROBES, Mixture
from megatron_bvpo.training.passes import NOTHING, Pass, Passes

logger = get_logger()


@dataclass
class Probe:
    """How a step is measured: each micro-batch item's half, and how many members the halves hold."""

    halves: list[list[str]]
    counts: StreamCounts
    split: bool


class Probes:
    """Measures a step's gradients by estimator and half, and leaves the mixture of all in Megatron's buffers.

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
            held = " and ".join(f"{halves} {stream}" for stream, halves in counts.members.items())
            logger.warning_once(
                f"Step {iteration + 1} cannot be a probe: its halves hold {held} pairs, and each needs one at least. "
                f"{self.mixture.as_it_is} on such steps; a larger --global_batch_size helps.",
                hash_id="bvpo_no_probe",
            )
            return None
        return Probe(halves, counts, split=can_split(len(items), pipeline=self.groups.pp_size, virtual=self.virtual))

    def _count_halves(self, items: list[list], halves: list[list[str]]) -> StreamCounts:
        """Rows that have each stream, and each two streams: one all-reduce of k(k + 1) numbers."""
        streams = self.mixture.estimated
        both = list(combinations(streams, 2))
        counts = torch.zeros(len(streams) + len(both), len(HALVES), dtype=torch.float64, device=get_current_device())
        for batch, sides in zip(items, halves, strict=True):
            for item, side in zip(batch, sides, strict=True):
                for row in item if isinstance(item, list) else [item]:
                    has = {stream: has_stream(row, stream) for stream in streams}
                    found = counts.new_tensor([*has.values(), *(has[s] and has[t] for s, t in both)])
                    counts[:, HALVES.index(side)] += row.get(WEIGHT_KEY, 1.0) * found
        dist.all_reduce(counts, group=self.groups.dp)
        found = [tuple(halves) for halves in counts.tolist()]
        k = len(streams)
        return StreamCounts(dict(zip(streams, found[:k], strict=True)), dict(zip(both, found[k:], strict=True)))

    def run(
        self, chunks: list[list[dict]], probe: Probe, iteration: int, apart: Mapping[str, float]
    ) -> tuple[Pass, Grams]:
        """Estimator × half, their finalised gradients kept apart, measured, and mixed with the weights as they are.

        Args:
            apart: streams that are not measured, with what their sums of losses count in this step.
        """
        slices = shards.gradient_slices(self.models, tp_rank=self.groups.tp_rank)
        streams, gradients, passes = self.mixture.estimated, {}, []
        router_losses = has_router_losses(self.router_configs)
        stays = not router_losses and not apart  # the last pass's gradient in the buffers
        with router_at_rest(self.router_configs):
            for stream in streams:
                for half, n in zip(HALVES, probe.counts.members[stream], strict=True):
                    self.zero_gradients()
                    parts = [self._batches_of_pass(batches, probe, stream, half) for batches in chunks]
                    passes.append(self.passes.run(parts, {stream: 1 / n}, forward_only=False))
                    last = len(passes) == len(streams) * len(HALVES)
                    gradients[stream, half] = [s.grad_E for s in slices] if stays and last else shards.take(slices)

        grams = measure_grams(slices, gradients, probe.counts, get_current_device(), self.groups.world)
        weights = self._weights_of_passes(probe.counts, iteration)
        own = weights.pop((streams[-1], HALVES[-1])) if stays else 1.0
        if not stays:
            passes += self._rest(chunks, apart, router_losses)
        shards.mix_in(slices, own, [(weight, gradients[key]) for key, weight in weights.items()])
        kept = len(weights)
        held = sum(s.grad_E.numel() * s.grad_E.element_size() for s in slices) * kept / 2**30
        logger.info_once(f"A probe keeps {kept} copies of this rank's gradient shard: {held:.2f} GiB.", "bvpo_kept")
        return _joined(passes), grams

    def _rest(self, chunks: list[list[dict]], apart: Mapping[str, float], router_losses: bool) -> list[Pass]:
        """What is not measured, left in the buffers as a one-pass step has it: the router's losses, once and from all
        streams' tokens together, and demonstrations."""
        self.zero_gradients()
        if router_losses:
            clear_expert_counters(self.models)
            done = self.passes.run(chunks, apart, forward_only=False)
            if done.sums is not None:  # the estimators' members have been counted
                done.sums[[i for i, s in enumerate(self.mixture.streams) if s not in apart]] = 0.0
            return [done] if apart else []
        parts = [[self.collate(some_streams(_rows(batch), apart)) for batch in batches] for batches in chunks]
        return [self.passes.run(parts, apart, forward_only=False)]

    def _weights_of_passes(self, counts: StreamCounts, iteration: int) -> dict[tuple[str, str], float]:
        """What each pass's mean gradient counts in the update: its stream's weight, times the half's share of pairs."""
        weights = self.mixture.weights(iteration)
        return {
            (stream, half): weights[stream] * fraction
            for stream in self.mixture.estimated
            for half, fraction in zip(HALVES, counts.fractions(stream), strict=True)
        }

    def _batches_of_pass(self, batches: list[dict], probe: Probe, stream: str, half: str) -> list[dict]:
        items = [batch[ITEMS_KEY] for batch in batches]
        rows = rows_of_pass(items, probe.halves, stream, half, split=probe.split)
        return [self.collate(batch) for batch in rows]


def _rows(batch: dict) -> list[dict]:
    """The rows of a micro-batch, out of their packs."""
    return [row for item in batch[ITEMS_KEY] for row in (item if isinstance(item, list) else [item])]


def _joined(passes: list[Pass]) -> Pass:
    """What the passes of one step found, as if they were one."""
    whole = Pass(NOTHING, 1.0, [row for done in passes for row in done.bad_rows])
    sums = [done.sums for done in passes]
    whole.sums = None if sums[0] is None else sum(sums)
    return whole
