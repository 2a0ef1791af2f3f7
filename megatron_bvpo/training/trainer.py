"""One BVPO training step as a story; the mathematics are in objective/, the groups in gradients/.

A step takes the whole global batch from the loader first, because the weight of a pair is 1 over the
number of pairs of its stream in the **global** batch, and that is known only then. Then

- most steps: both streams go through the model in one pass, each pair's loss weighted with alpha/N_t or
  (1 − alpha)/N_e;
- a probe step: the same pairs go through it as stream × half, four passes; their finalised gradients are kept
  apart, D, X and W are measured from them for later steps' alpha, and they are mixed with the current one.

The step is taken only if every rank's loss and gradient are finite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from swift.megatron.trainers.rlhf_mixin import MegatronRLHFTrainer
from swift.megatron.utils import (
    logical_and_across_model_parallel_group,
    reduce_max_stat_across_model_parallel_group,
)
from swift.utils import get_current_device, get_logger, is_master

from megatron_bvpo.data.batches import LAYOUT_KEY
from megatron_bvpo.errors import UserError
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.host.adapter_loading import require_all_loaded
from megatron_bvpo.host.fused_head import install_fused_head
from megatron_bvpo.host.lora_start import draw_lora_a
from megatron_bvpo.host.parallel_attributes import mend_parallel_attributes
from megatron_bvpo.host.phases import StepTimes, timed
from megatron_bvpo.host.replicas import Replicas, require_equal
from megatron_bvpo.host.router import (
    clear_expert_counters,
    expert_bias_at_rest,
    put_back_router_loss_sums,
    router_configs,
    router_loss_sums,
    update_expert_bias,
)
from megatron_bvpo.host.saving import CheckpointMixin
from megatron_bvpo.host.shaken_policy import adapters_begin_at_zero, shaken_policy
from megatron_bvpo.host.stop_signal import StopCallback
from megatron_bvpo.host.tuner_names import check_tuner_names, require_something_to_train
from megatron_bvpo.objective.streams import (
    STREAMS,
    PairCounts,
    StreamSums,
    StreamWeights,
    mixing_weights,
    stream_metrics,
)
from megatron_bvpo.training import canaries
from megatron_bvpo.training.early_stop import EarlyStopCallback
from megatron_bvpo.training.passes import Pass, PassMixin
from megatron_bvpo.training.patience import Patience
from megatron_bvpo.training.probing import ProbeMixin
from megatron_bvpo.training.referencing import ReferenceCacheMixin
from megatron_bvpo.training.row_counts import RowCounts
from megatron_bvpo.training.samplers import eval_dataloader_parts, train_sampler

logger = get_logger()

# So many steps in a row without a finite gradient, and the run is beyond help.
MAX_SKIPPED_STEPS = 20


class BvpoTrainer(PassMixin, ProbeMixin, ReferenceCacheMixin, CheckpointMixin, MegatronRLHFTrainer):
    """ms-swift's Megatron trainer with the BVPO objective."""

    def __init__(self, args, template):
        self.bvpo = args.bvpo
        self.groups = ParallelGroups.current()
        if self.groups.tp_rank or self.groups.cp_rank:  # they read the rows of a rank that tells what those lose
            template.bvpo = replace(template.bvpo, tell_losses=False)
        self._start_alpha()
        self.patience = Patience(args.early_stop_interval, bool(args.greater_is_better))
        self.skipped_in_a_row = 0
        self.heard = None
        self._canaries_due = self.bvpo.preference.uses_reference
        self._val_dataloaders: list = []
        self.row_counts = RowCounts() if args.streaming or args.lazy_tokenize else None
        with timed("building and reading the model"):
            super().__init__(args, template)
        self.step_times = StepTimes(self)
        self.callbacks += [self.step_times, StopCallback(self), EarlyStopCallback(self, self.patience)]
        self._router_configs = router_configs(self.unwrapped_models)
        for model in self.wrapped_models:
            # Stock raises on every non-finite gradient; here all ranks skip the step together.
            model.ddp_config.check_for_nan_in_grad = False
        self._check_merge_memory()
        self.replicas = Replicas([*self.unwrapped_models, *self.ref_models], self.groups)
        require_equal(self.replicas)
        self._open_reference_cache()

    # ---- model

    def _prepare_peft_model(self, models):
        args = self.args
        check_tuner_names(args, models)
        peft_models = super()._prepare_peft_model(models)
        require_something_to_train(models)
        for folder in args.adapters:
            require_all_loaded(self.bridge, models, folder, flag="adapters", adapter_name="default")
        for model in models:
            if not args.adapters:  # a checkpoint's are loaded later, over these
                draw_lora_a(model, args.seed, self.groups)
            mend_parallel_attributes(model, self.groups)
        return peft_models

    def prepare_model(self):
        if self.bvpo.preference.uses_reference:
            super().prepare_model()
            for folder in self.args.ref_adapters:
                name = {"flag": "ref_adapters", "adapter_name": "ref_adapter"}
                require_all_loaded(self.bridge, self.unwrapped_models, folder, **name)
        else:  # no reference model is loaded where none is asked
            super(MegatronRLHFTrainer, self).prepare_model()
            self.ref_models = []
        config = self.template.config
        vocab_size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
        for model in (*self.unwrapped_models, *self.ref_models):
            install_fused_head(model, impl=self.bvpo.logp_impl, vocab_size=vocab_size, memory_gib=self.bvpo.logp_memory)

    # ---- data

    def _prepare_dataloader(self, train_dataset, val_dataset=None):
        args = self.args
        if args.streaming:
            return super()._prepare_dataloader(train_dataset, val_dataset)
        sampler = train_sampler(args, train_dataset, self.state.consumed_train_samples, self.groups)
        train_dataloader = self._create_dataloader(train_dataset, sampler)
        val_dataloader = None
        if val_dataset is not None:
            dataset, sampler = eval_dataloader_parts(args, val_dataset, self.groups)
            val_dataloader = self._create_dataloader(dataset, sampler)
            self._val_dataloaders.append(val_dataloader)
        return train_dataloader, val_dataloader

    def _create_dataloader(self, dataset, batch_sampler):
        dataloader = super()._create_dataloader(dataset, batch_sampler)
        # Its own generator: making an iterator would else draw from the generator of the dropout masks.
        dataloader.generator = torch.Generator()
        return dataloader

    def setup_training(self, train_dataset, val_dataset):
        train_iterator, val_iterator = super().setup_training(train_dataset, val_dataset)
        if self.args.streaming and self.state.consumed_train_samples:
            self._skip_streamed(train_iterator)
        if self.bvpo.eval_on_start and val_dataset is not None and not self.state.iteration:
            self.evaluate(val_iterator)
            for model in self.wrapped_models:
                model.train()
        return train_iterator, val_iterator

    def _skip_streamed(self, data_iterator) -> None:
        """A stream has no offset to start from, so the consumed micro-batches are read and dropped."""
        args = self.args
        n = self.state.consumed_train_samples // (args.micro_batch_size * self.groups.dp_size)
        logger.info(f"Skipping {n} micro-batches of the stream that the checkpoint has consumed.")
        for iterator in data_iterator if isinstance(data_iterator, list) else [data_iterator]:
            for _ in range(n):
                next(iterator)

    def _take_global_batch(self, data_iterator) -> list[list[dict]]:
        """This rank's micro-batches of a step, once for each model chunk of a virtual pipeline."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        return [[next(it) for _ in range(self.args.num_microbatches)] for it in iterators]

    def _count_pairs(self, batches: list[dict]) -> PairCounts:
        """N_t and N_e of the global batch: one all-reduce of two numbers over data parallelism."""
        layouts = [batch[LAYOUT_KEY] for batch in batches]
        counts = torch.tensor(
            [sum(layout.real_pairs(s) for layout in layouts) for s in STREAMS],
            dtype=torch.float64,
            device=get_current_device(),
        )
        dist.all_reduce(counts, group=self.groups.dp)
        return PairCounts(*counts.tolist())

    # ---- one step

    def train_step(self, train_data_iterator):
        chunks = self._take_global_batch(train_data_iterator)
        if self.row_counts is not None:
            self.row_counts.add(batch[LAYOUT_KEY] for batch in chunks[0])
        self._reference_hits = (0, 0)
        self.heard = [] if self._canaries_due else None
        probe = self._plan_probe(chunks[0])
        loss_sums = router_loss_sums()
        with expert_bias_at_rest(self._router_configs):
            done = self._one_pass(chunks) if probe is None else self._four_passes(chunks, probe)
        self._flush_references_now_and_then()
        if not self._all_finite(done):
            clear_expert_counters(self.unwrapped_models)
            put_back_router_loss_sums(loss_sums)
            self._report_skipped(done, chunks[0])
            return [], 0.0, False
        self.skipped_in_a_row = 0
        if self._canaries_due:
            self._ask_the_canaries(chunks)
        update_expert_bias(self.wrapped_models, self._router_configs)

        successful, grad_norm, _ = self.optimizer.step()
        successful = logical_and_across_model_parallel_group(successful)
        # Under fp16 an overflow leaves no norm.
        grad_norm = reduce_max_stat_across_model_parallel_group(0.0 if grad_norm is None else grad_norm)
        if successful:
            self.opt_param_scheduler.step(increment=self.args.global_batch_size)
        else:
            scale = float(self.optimizer.get_loss_scale())
            logger.info(
                f"Step {self.state.iteration + 1} not taken: fp16 overflowed; the loss scale is {scale:.0f} now."
            )
        metrics = self._step_metrics(done)
        if self.moments is not None:  # later steps use it; this one was mixed with what was known before
            self._learn_alpha(self.moments)
        return metrics, grad_norm, successful

    def _zero_gradients(self) -> None:
        for model in self.wrapped_models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _one_pass(self, chunks: list[list[dict]]) -> Pass:
        self.moments = None
        self._zero_gradients()
        weights = mixing_weights(self.alpha, self._count_pairs(chunks[0]))
        return self._run_pass(chunks, weights, forward_only=False)

    # ---- is the reference one

    def _ask_the_canaries(self, chunks: list[list[dict]]) -> None:
        """Once, before the first update: warn of what training/canaries.py describes. Collective."""
        args, device = self.args, get_current_device()
        step, self.heard, self._canaries_due = self.heard, None, False
        n = 1 if len(chunks) == 1 else self.config.microbatch_group_size_per_vp_stage
        first = [batches[:n] for batches in chunks]
        adapted = args.tuner_type != "full"
        at_zero = adapters_begin_at_zero(self.unwrapped_models)
        rounding = canaries.rounding_of(args, self.config.num_layers, device)
        plain = self._listen(first)
        cached = self._cached_and_new(first[0], plain)
        with shaken_policy(self.unwrapped_models, adapted=adapted) as shake:
            for scale in canaries.SCALES:
                shaken = shake(scale)
                mine = canaries.FirstStep(step, plain, self._listen(first), cached).findings(rounding)
                mine.append((float(not at_zero), float(shaken)))
                *findings, (moved, shaken) = canaries.largest_over_ranks(mine, device, self.groups.world)
                if not shaken or canaries.shows(findings):
                    break
        resumed = self.state.iteration > 0
        begins_equal = canaries.reference_begins_as_policy(args, resumed=resumed, adapters_at_zero=not moved)
        silent_step = not canaries.noisy(args, self.config)
        if begins_equal and not silent_step:
            logger.info("Margins of the first step are not compared: the policy's training forward has dropout.")
        told = dict(begins_equal=begins_equal, silent_step=silent_step, shaken=bool(shaken), adapted=adapted)
        for line in canaries.warnings(findings, **told):
            logger.warning(line)

    # ---- is it finite

    def _all_finite(self, done: Pass) -> bool:
        """True on all ranks alike, before the optimizer or the scheduler move."""
        bad = bool(done.bad_rows)
        if not self.args.fp16:  # under fp16 an overflow is the loss scaler's business
            for model in self.wrapped_models:
                for buffer in (*model.buffers, *model.expert_parallel_buffers):
                    bad = bad or not bool(torch.isfinite(buffer.grad_data.sum()))
        return not self.groups.any_rank(bad, get_current_device())

    def _report_skipped(self, done: Pass, batches: list[dict]) -> None:
        self.skipped_in_a_row += 1
        found: list = [None] * dist.get_world_size()
        rows = sorted({row for batch in batches for s in STREAMS for row in batch[LAYOUT_KEY].rows[s]})
        dist.all_gather_object(found, (done.bad_rows, rows))
        bad = sorted({row for bad_rows, _ in found for row in bad_rows})
        step_rows = sorted({row for _, rows in found for row in rows})
        what = f"the loss is not finite for {', '.join(bad)}" if bad else "the gradient is not finite"
        logger.error(
            f"Step {self.state.iteration + 1} skipped on all ranks: {what}. Parameters, optimizer and schedule "
            f"are as before. Rows of this step: {step_rows}."
        )
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row without a finite gradient: the weights or the data are broken",
                remedy="Go on from an older checkpoint with a lower --lr.",
            )

    # ---- metrics

    def _step_metrics(self, done: Pass) -> list[dict[str, torch.Tensor]]:
        metrics = self._reduce_metrics(done.sums, self.alpha)
        if metrics:
            metrics["alpha"] = (self.alpha, 1)
            if self._references is not None:
                metrics["ref_cache/hits"] = self._reference_hits
            if self.moments is not None:
                metrics.update(self._probe_metrics(self.moments))
        return [_as_tensors(metrics)] if metrics else []

    def _reduce_metrics(self, sums: torch.Tensor | None, alpha: float) -> dict[str, tuple]:
        """Log names to (sum, count) over the data-parallel ranks; empty off the last stage."""
        if sums is None:
            return {}
        sums = sums.clone()
        dist.all_reduce(sums, group=self.groups.dp)
        trace, empty = (StreamSums(*row) for row in sums)
        return stream_metrics(trace, empty, alpha, rpo=bool(self.bvpo.preference.rpo_alpha))

    # ---- a run

    def train(self, train_dataset, val_dataset):
        if not self.bvpo.refs_only:
            return super().train(train_dataset, val_dataset)
        self.setup_model_training()
        self._fill_reference_cache({"training": train_dataset, "held-out": val_dataset})

    def on_log(self, logs, prefix=""):
        if self.row_counts is not None and not prefix:
            logs.update(self.row_counts.over(self.groups.dp).numbers())
        super().on_log(logs, prefix)

    def finalize_training(self):
        super().finalize_training()
        self._flush_references()
        if is_master():
            self._write_peft_forms()  # of a run that had nothing more to save
        if self.row_counts is not None:
            for line in self.row_counts.over(self.groups.dp).lines():
                logger.info(line)

    # ---- evaluation

    def _determine_best_metric(self, metrics):
        """Called in front of a save, on all ranks: what it finds is in the checkpoint."""
        better = super()._determine_best_metric(metrics)
        if metrics is not None:
            self.patience.look(self.state.best_metric)
        return better

    def evaluate(self, val_data_iterator):
        """Every held-out pair once; `eval_loss` mixes the streams at a fixed alpha."""
        for model in self.wrapped_models:
            model.eval()
        if self._val_dataloaders:
            iterators = [iter(loader) for loader in self._val_dataloaders]
            val_data_iterator = iterators if len(iterators) > 1 else iterators[0]
        self.call_event("on_eval_begin")
        totals = None
        with torch.no_grad():
            for _ in range(self.args.eval_iters):
                chunks = self._take_global_batch(val_data_iterator)
                done = self._run_pass(chunks, StreamWeights(0.0, 0.0), forward_only=True)
                if done.sums is not None:
                    totals = done.sums if totals is None else totals + done.sums
                self.call_event("on_eval_step")
        metrics: dict[str, Any] = _as_tensors(self._reduce_metrics(totals, self.bvpo.eval_alpha))
        self._flush_references()
        metrics["n_steps"] = self.args.eval_iters
        self.on_log(logs=metrics, prefix="eval_")
        self.call_event("on_eval_end")
        return metrics


def _as_tensors(metrics: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """(sum, count) pairs as ms-swift aggregates them: tensors of two numbers."""
    device = get_current_device()
    return {
        name: torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in pair])
        for name, pair in metrics.items()
    }
