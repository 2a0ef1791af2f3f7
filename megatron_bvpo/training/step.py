"""One training step as a story; the mathematics are in objective/, the groups in gradients/.

A step has the whole global batch from the start, because the weight of a pair is 1 over the number of pairs of its
stream in the **global** batch, and that is known only then. Then

- most steps: all streams go through the model in one pass, each member's loss weighted with its stream's weight/N;
- a probe step: the same rows go through it as estimator × half; the finalised gradients of these passes are kept
  apart, their Gram matrices are measured for later steps' weights, and they are mixed with the current ones.

The step is taken only if every rank's loss and gradient are finite.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from swift.megatron.utils import (
    logical_and_across_model_parallel_group,
    reduce_max_stat_across_model_parallel_group,
)
from swift.utils import get_current_device, get_logger

from megatron_bvpo.data.batches import LAYOUT_KEY
from megatron_bvpo.errors import UserError
from megatron_bvpo.gradients.grams import Grams
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.host.router import (
    clear_expert_counters,
    expert_bias_at_rest,
    put_back_router_loss_sums,
    router_loss_sums,
    update_expert_bias,
)
from megatron_bvpo.objective.streams import mixing_factors
from megatron_bvpo.training.baselines import Baselines
from megatron_bvpo.training.canary_questions import CanaryQuestions
from megatron_bvpo.training.mixture import Mixture
from megatron_bvpo.training.passes import Pass, Passes
from megatron_bvpo.training.probing import Probes
from megatron_bvpo.training.referencing import References
from megatron_bvpo.training.step_metrics import as_tensors, reduced_metrics

logger = get_logger()

# So many steps in a row without a finite gradient, and the run is beyond help.
MAX_SKIPPED_STEPS = 20


class Step:
    """Takes steps.

    Args:
        args: ms-swift's arguments: `fp16` and `global_batch_size`.
        models: this rank's wrapped model chunks, their router configurations, and what moves them.
        groups: process groups.
        mixture, passes, baselines, probes, references, canaries: what a step is made of.
        zero_gradients: clears Megatron's buffers.
    """

    def __init__(
        self,
        args,
        models: list,
        router_configs: list,
        optimizer,
        scheduler,
        groups: ParallelGroups,
        *,
        mixture: Mixture,
        passes: Passes,
        baselines: Baselines,
        probes: Probes,
        references: References,
        canaries: CanaryQuestions,
        zero_gradients,
    ):
        self.args, self.models, self.router_configs, self.groups = args, models, router_configs, groups
        self.optimizer, self.scheduler, self.zero_gradients = optimizer, scheduler, zero_gradients
        self.mixture, self.passes, self.baselines, self.probes = mixture, passes, baselines, probes
        self.references, self.canaries = references, canaries
        self.skipped_in_a_row = 0

    def take(self, chunks: list[list[dict]], iteration: int) -> tuple[list[dict], float, bool]:
        """One step on a global batch, behind `iteration` steps.

        Args:
            chunks: this rank's micro-batches, once for each model chunk of a virtual pipeline.

        Returns:
            (metrics, gradient norm, whether it was taken), as ms-swift's `train_step`.
        """
        self.references.begin_step()
        self.baselines.measure(chunks)
        self.passes.overheard = heard = [] if self.canaries.due else None
        probe = self.probes.plan(chunks[0], iteration)
        loss_sums = router_loss_sums()
        with expert_bias_at_rest(self.router_configs):
            if probe is None:
                done, grams = self.one_pass(chunks, iteration), None
            else:
                done, grams = self.probes.run(chunks, probe, iteration, self._apart(chunks, iteration))
        self.references.flush_now_and_then(iteration + 1)
        self.passes.overheard = None
        if not self._all_finite(done):
            clear_expert_counters(self.models)
            put_back_router_loss_sums(loss_sums)
            self._report_skipped(done, chunks[0], iteration + 1)
            return [], 0.0, False
        self.skipped_in_a_row = 0
        if self.canaries.due:
            self.canaries.ask(chunks, heard, resumed=iteration > 0)
        update_expert_bias(self.models, self.router_configs)
        grad_norm, successful = self._update(iteration + 1)
        metrics = self._metrics(done, grams, iteration)
        if grams is not None:  # later steps use it; this one was mixed with what was known before
            self.mixture.learn(grams, iteration + 1)
        return metrics, grad_norm, successful

    def one_pass(self, chunks: list[list[dict]], iteration: int) -> Pass:
        """The gradient of the mixed loss, in Megatron's buffers."""
        factors = self._factors(chunks, iteration)
        self.zero_gradients()
        return self.passes.run(chunks, factors, forward_only=False)

    def _apart(self, chunks: list[list[dict]], iteration: int) -> dict[str, float]:
        """The factors of streams that no probe measures."""
        factors = self._factors(chunks, iteration) if self.mixture.apart else {}
        return {stream: factor for stream, factor in factors.items() if stream not in self.mixture.estimated}

    def _factors(self, chunks: list[list[dict]], iteration: int) -> dict[str, float]:
        """What each stream's sum of losses counts: its weight over its number in the global batch.

        One all-reduce of a number a stream over data parallelism.
        """
        layouts, streams = [batch[LAYOUT_KEY] for batch in chunks[0]], self.mixture.streams
        counts = torch.tensor(
            [sum(layout.real_count(s) for layout in layouts) for s in streams],
            dtype=torch.float64,
            device=get_current_device(),
        )
        dist.all_reduce(counts, group=self.groups.dp)
        return mixing_factors(self.mixture.weights(iteration), dict(zip(streams, counts.tolist(), strict=True)))

    def _update(self, step: int) -> tuple[float, bool]:
        """Move the parameters: (gradient norm, whether they moved)."""
        successful, grad_norm, _ = self.optimizer.step()
        successful = logical_and_across_model_parallel_group(successful)
        # Under fp16 an overflow leaves no norm.
        grad_norm = reduce_max_stat_across_model_parallel_group(0.0 if grad_norm is None else grad_norm)
        if successful:
            self.scheduler.step(increment=self.args.global_batch_size)
        else:
            scale = float(self.optimizer.get_loss_scale())
            logger.info(f"Step {step} not taken: fp16 overflowed; the loss scale is {scale:.0f} now.")
        return grad_norm, successful

    # ---- is it finite

    def _all_finite(self, done: Pass) -> bool:
        """True on all ranks alike, before the optimizer or the scheduler move."""
        bad = bool(done.bad_rows)
        if not self.args.fp16:  # under fp16 an overflow is the loss scaler's business
            for model in self.models:
                for buffer in (*model.buffers, *model.expert_parallel_buffers):
                    bad = bad or not bool(torch.isfinite(buffer.grad_data.sum()))
        return not self.groups.any_rank(bad, get_current_device())

    def _report_skipped(self, done: Pass, batches: list[dict], step: int) -> None:
        self.skipped_in_a_row += 1
        found: list = [None] * dist.get_world_size()
        rows = sorted({row for batch in batches for rows in batch[LAYOUT_KEY].rows.values() for row in rows})
        dist.all_gather_object(found, (done.bad_rows, rows))
        bad = sorted({row for bad_rows, _ in found for row in bad_rows})
        step_rows = sorted({row for _, rows in found for row in rows})
        what = f"the loss is not finite for {', '.join(bad)}" if bad else "the gradient is not finite"
        logger.error(
            f"Step {step} skipped on all ranks: {what}. Parameters, optimizer and schedule "
            f"are as before. Rows of this step: {step_rows}."
        )
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row without a finite gradient: the weights or the data are broken",
                remedy="Go on from an older checkpoint with a lower --lr.",
            )

    # ---- metrics

    def _metrics(self, done: Pass, grams: Grams | None, iteration: int) -> list[dict[str, torch.Tensor]]:
        weights = self.mixture.weights(iteration)
        metrics = reduced_metrics(done.sums, self.passes.losses, weights, self.groups.dp)
        if not metrics:
            return []
        metrics |= self.mixture.metrics(iteration) | self.baselines.metrics()
        if self.references.table is not None:
            metrics["ref_cache/hits"] = self.references.hits
        if grams is not None:
            metrics.update(self.mixture.probe_metrics(grams))
        return [as_tensors(metrics)]
