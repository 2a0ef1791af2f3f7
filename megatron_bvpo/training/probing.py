"""Probe steps: where alpha comes from. The estimator is gradients/alpha.py; here it meets Megatron's passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from swift.utils import get_current_device, get_logger

from megatron_bvpo.data.batches import ITEMS_KEY, WEIGHT_KEY
from megatron_bvpo.gradients import shards
from megatron_bvpo.gradients.alpha import AlphaEstimator, Moments
from megatron_bvpo.gradients.halves import HALVES, can_split, half_of_items, rows_of_pass
from megatron_bvpo.gradients.moments import StreamCounts, measure_grams
from megatron_bvpo.host.router import (
    clear_expert_counters,
    has_router_losses,
    router_at_rest,
)
from megatron_bvpo.objective.streams import STREAMS, StreamWeights
from megatron_bvpo.training.passes import Pass

logger = get_logger()

# Every step measures until there is evidence for an alpha.
FIRST_PROBES = 8
# Copies of a rank's gradient shard that a probe keeps: of its four passes the last one's stays in the buffers.
# One more where the router has losses of its own (`_four_passes`).
KEPT_SHARDS = 3
# Beyond these the other stream costs more than it gives.
LOPSIDED = (0.05, 0.95)


@dataclass
class Probe:
    """How a step is measured: each micro-batch item's half, and how many pairs the halves hold."""

    halves: list[list[str]]
    counts: StreamCounts
    split: bool


class ProbeMixin:
    """Goes in front of the trainer; uses its passes, groups and configuration."""

    def _start_alpha(self) -> None:
        config = self.bvpo
        self.estimator = None
        if config.alpha is None:
            self.estimator = AlphaEstimator(
                prior=config.alpha_prior,
                criterion=config.criterion,
                kappa=config.kappa,
                moment_decay=config.moment_decay,
            )
        self.alpha = config.alpha_prior if config.alpha is None else config.alpha
        self.moments: Moments | None = None  # of this step, if it was a probe

    # ---- a probe

    def _plan_probe(self, batches: list[dict]) -> Probe | None:
        """The step's halves, or None: not a probe, or the batch is too small to be halved."""
        step = self.state.iteration
        if self.estimator is None or (step >= FIRST_PROBES and step % self.bvpo.probe_interval):
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
                f"Step {step + 1} cannot be a probe: its halves hold {trace} trace and {empty} empty "
                f"pairs, and each needs one at least. alpha stays at {self.alpha:.2f} on such steps; a larger "
                "--global_batch_size helps.",
                hash_id="bvpo_no_probe",
            )
            return None
        virtual = self.args.virtual_pipeline_model_parallel_size is not None
        return Probe(halves, counts, split=can_split(len(items), pipeline=self.groups.pp_size, virtual=virtual))

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

    def _four_passes(self, chunks: list[list[dict]], probe: Probe) -> Pass:
        """Stream × half, their finalised gradients kept apart, measured, and mixed with the current alpha."""
        slices = shards.gradient_slices(self.wrapped_models, tp_rank=self.groups.tp_rank)
        configs = self._router_configs
        router_losses = has_router_losses(configs)
        gradients, passes = {}, []
        with router_at_rest(configs):
            for stream in STREAMS:
                for half, n in zip(HALVES, probe.counts.members[stream], strict=True):
                    weights = StreamWeights(**{s: 1 / n if s == stream else 0.0 for s in STREAMS})
                    self._zero_gradients()
                    parts = [self._batches_of_pass(batches, probe, stream, half) for batches in chunks]
                    passes.append(self._run_pass(parts, weights, forward_only=False))
                    last = len(passes) == len(STREAMS) * len(HALVES)
                    stays = last and not router_losses
                    gradients[stream, half] = [s.grad_E for s in slices] if stays else shards.take(slices)

        device = get_current_device()
        self.moments = measure_grams(slices, gradients, probe.counts, device, self.groups.world).moments()
        weights = self._weights_of_passes(probe.counts)
        kept = KEPT_SHARDS
        own = weights.pop(("empty", "B")) if not router_losses else 1.0
        if router_losses:
            # They enter the update once, as a one-pass step has them: from both streams' tokens together.
            kept += 1
            clear_expert_counters(self.unwrapped_models)
            self._zero_gradients()
            self._run_pass(chunks, StreamWeights(0.0, 0.0), forward_only=False)
        shards.mix_in(slices, own, [(weight, gradients[key]) for key, weight in weights.items()])
        held = sum(s.grad_E.numel() * s.grad_E.element_size() for s in slices) * kept / 2**30
        logger.info_once(f"A probe keeps {kept} copies of this rank's gradient shard: {held:.2f} GiB.", "bvpo_kept")

        sums = [done.sums for done in passes]
        whole = Pass(StreamWeights(0.0, 0.0), 1.0, [row for done in passes for row in done.bad_rows])
        whole.sums = None if sums[0] is None else sum(sums)
        return whole

    def _weights_of_passes(self, counts: StreamCounts) -> dict[tuple[str, str], float]:
        """What each pass's mean gradient counts in the update: alpha of the stream, times the half's share of pairs."""
        return {
            (stream, half): weight * fraction
            for stream, weight in (("trace", self.alpha), ("empty", 1 - self.alpha))
            for half, fraction in zip(HALVES, counts.fractions(stream), strict=True)
        }

    def _batches_of_pass(self, batches: list[dict], probe: Probe, stream: str, half: str) -> list[dict]:
        items = [batch[ITEMS_KEY] for batch in batches]
        rows = rows_of_pass(items, probe.halves, stream, half, split=probe.split)
        return [self.data_collator(batch) for batch in rows]

    def _learn_alpha(self, moments: Moments) -> None:
        ignored = self.estimator.ignored
        self.estimator.update(moments)
        if self.estimator.ignored > ignored:
            logger.warning(f"The probe at step {self.state.iteration + 1} is ignored: {self.estimator.last_ignored}.")
        self.alpha = self.estimator.alpha
        low, high = LOPSIDED
        if self.estimator.probes >= 2 * FIRST_PROBES and not low <= self.alpha <= high:
            stream = "empty" if self.alpha > high else "trace"
            logger.warning_once(
                f"alpha is {self.alpha:.2f}: the {stream} stream costs a forward and a backward pass and hardly "
                f"counts. Consider --bvpo_alpha {round(self.alpha)}, which does not run it.",
                hash_id="bvpo_lopsided_alpha",
            )

    def _probe_metrics(self, moments: Moments) -> dict[str, tuple]:
        found = {f"moments/{name}": (getattr(moments, name), 1) for name in ("D", "X", "W", "V_t")}
        found["alpha/stderr"] = (self.estimator.stderr, 1)
        for name, end in zip(("alpha/low", "alpha/high"), self.estimator.band, strict=True):
            found[name] = (end, 1)
        predicted = self.estimator.predicted_mse()
        if predicted is not None:
            for name in ("trace_only", "empty_only", "half", "chosen"):
                found[f"mse/{name}"] = (getattr(predicted, name), 1)
        return found

    def finalize_training(self):
        super().finalize_training()
        if self.estimator is not None:
            logger.info(self.estimator.summary())
