"""ms-swift's Megatron trainer with the BVPO objective: its life cycle, in which our parts are made and called.

A step is step.py's, which is where to read on: pass → loss, or probe → passes → Gram matrices.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from swift.megatron.trainers.rlhf_mixin import MegatronRLHFTrainer
from swift.utils import get_logger, is_master

from megatron_bvpo.data.batches import LAYOUT_KEY
from megatron_bvpo.gradients import shards
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.host.adapter_loading import require_all_loaded
from megatron_bvpo.host.fused_head import install_fused_head
from megatron_bvpo.host.grown_layers import (
    names_of,
    new_layer_numbers,
    train_beside_adapters,
    train_only,
    without_layers,
)
from megatron_bvpo.host.lora_start import draw_lora_a
from megatron_bvpo.host.merging import BaseWeights, check_merge_memory
from megatron_bvpo.host.parallel_attributes import mend_parallel_attributes
from megatron_bvpo.host.patches import loaded_in_part, whole_layers_beside_adapters
from megatron_bvpo.host.phases import StepTimes, timed
from megatron_bvpo.host.replicas import Replicas, require_equal, tell_unequal
from megatron_bvpo.host.router import router_configs
from megatron_bvpo.host.saving import Checkpoints, write_peft_forms
from megatron_bvpo.host.stop_signal import StopCallback
from megatron_bvpo.host.tuner_names import check_tuner_names, require_something_to_train
from megatron_bvpo.streams import estimators
from megatron_bvpo.training.baselines import Baselines
from megatron_bvpo.training.canary_questions import CanaryQuestions
from megatron_bvpo.training.early_stop import EarlyStopCallback
from megatron_bvpo.training.mixture import Mixture
from megatron_bvpo.training.passes import Passes
from megatron_bvpo.training.patience import Patience
from megatron_bvpo.training.probing import Probes
from megatron_bvpo.training.reference_run import fill_references
from megatron_bvpo.training.referencing import References
from megatron_bvpo.training.row_counts import RowCounts
from megatron_bvpo.training.samplers import eval_dataloader_parts, train_sampler
from megatron_bvpo.training.step import Step
from megatron_bvpo.training.step_metrics import as_tensors, reduced_metrics

logger = get_logger()


class BvpoTrainer(MegatronRLHFTrainer):
    """What ms-swift calls, in the order of a run; the parts are made once and know nothing of it.

    Attributes:
        bvpo: the configuration.
        groups: process groups.
        mixture: the streams' weights.
        passes, baselines, probes, references, canaries, step: a step and its parts.
        checkpoints, base_weights, replicas: saving.
        patience: when a run that gets no better ends.
        row_counts: rows that are encoded while training, or None.
    """

    def __init__(self, args, template):
        self.bvpo = args.bvpo
        self.groups = ParallelGroups.current()
        # Of a grown model whose new layers are trained, and are no part of the reference; else ().
        self.new_layers = new_layer_numbers(template.config, args.model_dir) if self.bvpo.new_layers_only else ()
        if self.groups.tp_rank or self.groups.cp_rank:  # they read the rows of a rank that tells what those lose
            template.bvpo = replace(template.bvpo, tell_losses=False)
        self.mixture = Mixture(self.bvpo)
        self.patience = Patience(args.early_stop_interval, bool(args.greater_is_better))
        self.base_weights = BaseWeights()
        self._val_dataloaders: list = []
        self.row_counts = RowCounts(self.bvpo.streams) if args.streaming or args.lazy_tokenize else None
        with timed("building and reading the model"):
            super().__init__(args, template)
        self.step_times = StepTimes(self)
        self.callbacks += [self.step_times, StopCallback(self), EarlyStopCallback(self, self.patience)]
        for model in self.wrapped_models:
            # Stock raises on every non-finite gradient; here all ranks skip the step together.
            model.ddp_config.check_for_nan_in_grad = False
        if not self.bvpo.refs_only:
            check_merge_memory(args, self.unwrapped_models)
        self.replicas = Replicas([*self.unwrapped_models, *self.ref_models], self.groups)
        require_equal(self.replicas)
        self._make_step()

    def _make_step(self) -> None:
        args, bvpo, groups, models = self.args, self.bvpo, self.groups, self.wrapped_models
        routers, zero_gradients = router_configs(self.unwrapped_models), partial(shards.clear, models, self.optimizer)
        self.references = References(args, bvpo.ref_cache, groups)
        reference_models = self.null_ref_context
        if self.new_layers:
            reference_models = partial(without_layers, reference_models, self.unwrapped_models, self.new_layers)
        self.passes = Passes(args, models, groups, bvpo.losses, self.references, reference_models, self.get_batch)
        self.probes = Probes(
            self.mixture,
            self.passes,
            models,
            groups,
            router_configs=routers,
            collate=self.data_collator,
            zero_gradients=zero_gradients,
            interval=bvpo.probe_interval,
            virtual=args.virtual_pipeline_model_parallel_size is not None,
        )
        self.baselines = Baselines(
            self.passes,
            estimators(bvpo.streams) if bvpo.losses.uses_baseline else (),
            groups,
            collate=self.data_collator,
            max_length=args.max_length,
        )
        self.canaries = CanaryQuestions(
            args, self.config, self.unwrapped_models, self.passes, self.references, groups, self.new_layers
        )
        self.step = Step(
            args,
            models,
            routers,
            self.optimizer,
            self.opt_param_scheduler,
            groups,
            mixture=self.mixture,
            passes=self.passes,
            baselines=self.baselines,
            probes=self.probes,
            references=self.references,
            canaries=self.canaries,
            zero_gradients=zero_gradients,
        )

    # ---- model

    def _prepare_peft_model(self, models):
        args = self.args
        check_tuner_names(args, models)
        peft_models = super()._prepare_peft_model(models)
        if self.new_layers:
            if args.tuner_type == "full":
                train_only(models, self.new_layers)
            else:
                train_beside_adapters(models, self.new_layers, args.freeze_parameters_regex)
        require_something_to_train(models)
        for folder in args.adapters:
            require_all_loaded(self.bridge, models, folder, flag="adapters", adapter_name="default")
        for model in models:
            if not args.adapters:  # a checkpoint's are loaded later, over these
                draw_lora_a(model, args.seed, self.groups)
            mend_parallel_attributes(model, self.groups)
        return peft_models

    def prepare_model(self):
        if self.bvpo.losses.uses_reference and not self.new_layers:
            super().prepare_model()
            for folder in self.args.ref_adapters:
                name = {"flag": "ref_adapters", "adapter_name": "ref_adapter"}
                require_all_loaded(self.bridge, self.unwrapped_models, folder, **name)
        else:  # no reference model is loaded where none is asked, or where the policy has one in it
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

    # ---- a run

    def train(self, train_dataset, val_dataset):
        if not self.bvpo.refs_only:
            return super().train(train_dataset, val_dataset)
        self.setup_model_training()
        args = self.args
        for name, dataset in (("training", train_dataset), ("held-out", val_dataset)):
            if dataset is not None:
                filled, sampler = eval_dataloader_parts(args, dataset, self.groups)
                chunks = args.virtual_pipeline_model_parallel_size or 1
                iterators = [iter(self._create_dataloader(filled, sampler)) for _ in range(chunks)]
                steps = len(filled) // args.global_batch_size
                fill_references(name, iterators, steps, self._take_global_batch, self.passes, self.references)
        logger.info(f"Reference log-probs of {len(self.references.table)} pairs are known now.")

    def train_step(self, train_data_iterator):
        chunks = self._take_global_batch(train_data_iterator)
        if self.row_counts is not None:
            self.row_counts.add(batch[LAYOUT_KEY] for batch in chunks[0])
        return self.step.take(chunks, self.state.iteration)

    def forward_step(self, data_iterator, model):
        raise AssertionError("Megatron's schedule gets Passes.forward")  # abstract in ms-swift's class

    def on_log(self, logs, prefix=""):
        if self.row_counts is not None and not prefix:
            logs.update(self.row_counts.over(self.groups.dp).numbers())
        super().on_log(logs, prefix)

    def finalize_training(self):
        super().finalize_training()
        self.mixture.say_summary()
        self.references.flush()
        if is_master():
            write_peft_forms(self.args.output_dir, self.template.config)  # of a run that had nothing more to save
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
        """Every held-out row once; `eval_loss` mixes the streams at fixed weights."""
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
                self.baselines.measure(chunks, dealt_in_turn=False)
                done = self.passes.run(chunks, forward_only=True)
                if done.sums is not None:
                    totals = done.sums if totals is None else totals + done.sums
                self.call_event("on_eval_step")
        found = reduced_metrics(totals, self.passes.losses, self.bvpo.eval_weights, self.groups.dp)
        metrics: dict[str, Any] = as_tensors(found)
        self.references.flush()
        metrics["n_steps"] = self.args.eval_iters
        self.on_log(logs=metrics, prefix="eval_")
        self.call_event("on_eval_end")
        return metrics

    # ---- saving and resuming

    def _load_checkpoint(self):
        """ms-swift calls it as soon as there are models, an optimizer and a state."""
        self.checkpoints = Checkpoints(
            self.args,
            self.template.config,
            self.state,
            self.bridge,
            self.optimizer,
            self.opt_param_scheduler,
            mixture=self.mixture,
            patience=self.patience,
            loss=vars(self.bvpo.preference),
            files=self._files,
        )
        with loaded_in_part(self.wrapped_models if self.args.tuner_type != "full" else ()):
            self.checkpoints.load(super()._load_checkpoint)

    def _files(self):
        """What of a checkpoint is other than ms-swift's: new layers that are trained whole beside adapters."""
        if not self.new_layers or self.args.tuner_type == "full":
            return nullcontext()
        names = names_of(self.unwrapped_models, self.new_layers)
        return whole_layers_beside_adapters(names, self.bridge)

    def _load_iteration(self):
        return self.checkpoints.iteration(super()._load_iteration)

    def save_checkpoint(self):
        tell_unequal(self.replicas)
        seconds = self.checkpoints.save(super().save_checkpoint, self.references.flush, self._sorted_checkpoints)
        self.step_times.after_save(seconds)

    def _rotate_checkpoints(self, output_dir: str):
        self.checkpoints.rotate(self._sorted_checkpoints(output_dir))

    def merge_lora_adapters(self, adapter_name="default"):
        self.base_weights.keep(self.unwrapped_models)
        super().merge_lora_adapters(adapter_name)

    def unmerge_lora_adapters(self):
        super().unmerge_lora_adapters()
        self.base_weights.give_back()
