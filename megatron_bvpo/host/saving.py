"""Saving and resuming for the trainer: whole checkpoints, exact merges, and the state to go on from."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from mcore_bridge import LoraParallelLinear
from swift.utils import get_logger, is_master

from megatron_bvpo.errors import UserError
from megatron_bvpo.host import checkpoint as ckpt
from megatron_bvpo.host.patches import groups_at_any_rate
from megatron_bvpo.host.peft_export import is_due, set_aside, write_peft_form
from megatron_bvpo.host.phases import tell, timed
from megatron_bvpo.host.replicas import tell_unequal

logger = get_logger()

MODEL_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_experts")
LORA_KEYS = ("tuner_type", "lora_rank", "lora_alpha", "use_rslora", "target_modules")


class CheckpointMixin:
    """Goes in front of ms-swift's Megatron trainer."""

    def _check_merge_memory(self) -> None:
        """Refuse at the start what would end a node at its first save. Collective."""
        args = self.args
        if args.tuner_type == "full" or not (args.merge_lora and args.save_safetensors) or self.bvpo.refs_only:
            return
        local = sum(p.numel() * p.element_size() for p in self._merged_parameters())
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        problem = ckpt.merge_needs_more(local, ranks, psutil.virtual_memory().available)
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem and f"{socket.gethostname()}: {problem}")
        for told in dict.fromkeys(found):
            if told:
                raise UserError(
                    f"a merge keeps the base weights in host memory, which is too small on {told}",
                    field="--merge_lora",
                    remedy="give --merge_lora false and merge once after the run (swift export --merge_lora true)",
                )

    def _merged_parameters(self):
        for model in self.unwrapped_models:
            for module in model.modules():
                if isinstance(module, LoraParallelLinear):
                    yield from module.get_base_layer().parameters(recurse=False)

    # ---- merging

    def merge_lora_adapters(self, adapter_name="default"):
        """Merge, and keep the base weights: `W += d; W -= d` does not give W back in floating point."""
        self._base_weights = [(param, param.detach().to("cpu", copy=True)) for param in self._merged_parameters()]
        super().merge_lora_adapters(adapter_name)

    def unmerge_lora_adapters(self):
        super().unmerge_lora_adapters()
        with torch.no_grad():
            for param, weight in self._base_weights:
                param.copy_(weight)
        self._base_weights = []

    # ---- saving

    def save_checkpoint(self):
        """Write a checkpoint aside and publish it; only then the adapter's form for peft, which no restart needs."""
        began = time.monotonic()
        args, state = self.args, self.state
        output_dir = args.output_dir
        staging = Path(output_dir) / ckpt.STAGING
        tell_unequal(self.replicas)
        # Writing files may draw random numbers, on some ranks only; the run goes on from this state, saved or not.
        random_state = ckpt.random_state()
        if is_master():
            ckpt.open_staging(output_dir)
        with timed("save: reference log-probs"):
            self._flush_references()
            dist.barrier()
        args.output_dir = str(staging)
        try:
            with timed("save: Megatron's files, and the lines of save_weights", self.bridge, "save_weights"):
                super().save_checkpoint()
        finally:
            args.output_dir = output_dir
        name = Path(state.last_model_checkpoint).name
        with timed("save: random states"):
            ckpt.save_random_state(staging / name, dist.get_rank(), random_state)
            dist.barrier()
        state.last_model_checkpoint = str(Path(output_dir) / name)
        if state.best_global_step is not None:
            best = Path(output_dir) / f"checkpoint-{state.best_global_step}"
            if best.name == name or best.exists():
                state.best_model_checkpoint = str(best)
        if is_master():
            with timed("save: publishing, and removing old checkpoints"):
                set_aside(staging / name)
                self._add_generation_config(staging)
                ckpt.write_state(staging / name, self._checkpoint_state())
                ckpt.publish(staging, name)
                self._rotate_checkpoints(output_dir)
            tell("save: all that a restart needs", time.monotonic() - began)
            logger.info(f"The checkpoint is whole: {state.last_model_checkpoint}")
            self._write_peft_forms()
        ckpt.restore_random_state(random_state)
        dist.barrier()
        tell("save: all of it", time.monotonic() - began)
        self.step_times.after_save(time.monotonic() - began)

    def _write_peft_forms(self) -> None:
        """Of the last checkpoint, and of older ones whose save was cut short behind their publication."""
        for folder in reversed(ckpt.whole_checkpoints(Path(self.args.output_dir))):
            if is_due(folder):
                with timed(f"save: the adapter of {folder.name} in peft's form"):
                    write_peft_form(folder, self.template.config)

    def _add_generation_config(self, staging: Path) -> None:
        """The model's own sampling settings and end-of-text tokens, which ms-swift leaves out of what it exports."""
        source = Path(self.args.model_info.model_dir) / "generation_config.json"
        for config in staging.glob("*/config.json") if source.is_file() else ():
            shutil.copy(source, config.parent)

    def _rotate_checkpoints(self, output_dir: str) -> None:
        """As ms-swift's, but a checkpoint whose removal was cut short does not look whole."""
        if self.args.save_total_limit:
            ckpt.rotate(self._sorted_checkpoints(output_dir), self.args.save_total_limit)

    def _checkpoint_state(self) -> dict[str, Any]:
        """What bvpo_state.json holds besides its format."""
        state = self.state
        return {
            "iteration": state.iteration,
            "consumed_train_samples": state.consumed_train_samples,
            "alpha": self.alpha,
            "estimator": None if self.estimator is None else self.estimator.state_dict(),
            "optimizer_reshardable": self._optimizer_reshardable(),
            "best_metric": state.best_metric,
            "best_global_step": state.best_global_step,
            "best_model_checkpoint": state.best_model_checkpoint,
            "patience": self.patience.state_dict(),
            "layout": self._layout_name(),
            "model": self._model_identity(),
            "tuner": self._tuner_identity(),
            "loss": vars(self.bvpo.preference),
        }

    def _optimizer_reshardable(self) -> bool:
        """Whether the saved optimizer can be read under another TP, PP or EP."""
        args = self.args
        return not args.use_distributed_optimizer or args.dist_ckpt_optim_fully_reshardable

    def _layout_name(self) -> dict[str, int]:
        args = self.args
        return {
            "world_size": dist.get_world_size(),
            "tp": args.tensor_model_parallel_size,
            "pp": args.pipeline_model_parallel_size,
            "vpp": args.virtual_pipeline_model_parallel_size or 1,
            "cp": args.context_parallel_size,
            "ep": args.expert_model_parallel_size,
            "etp": args.expert_tensor_parallel_size,
        }

    def _model_identity(self) -> dict[str, Any]:
        config = self.template.config
        config = getattr(config, "text_config", None) or config
        return {key: getattr(config, key, None) for key in MODEL_KEYS}

    def _tuner_identity(self) -> dict[str, Any]:
        args = self.args
        return {key: getattr(args, key) for key in (LORA_KEYS if args.tuner_type != "full" else ("tuner_type",))}

    # ---- resuming

    def _resume_folder(self) -> str | None:
        args = self.args
        if args.finetune:
            return None
        # With LoRA, --mcore_model may name the base model in Megatron's format.
        return args.mcore_adapter or (args.mcore_model if args.tuner_type == "full" else None)

    def _load_checkpoint(self):
        folder = self._resume_folder()
        if folder is not None:
            saved = ckpt.read_state(folder)
            self._check_same_model(folder, saved)
            self._check_same_tuner(folder, saved)
            self._check_layout_change(folder, saved)
        if is_master():
            ckpt.clear_staging(self.args.output_dir)
            for checkpoint in ckpt.whole_checkpoints(Path(self.args.output_dir)):
                if is_due(checkpoint):
                    logger.info(f"{checkpoint.name} lacks its adapter in peft's form; the next save writes it.")
        asked = ckpt.schedule_of(self.opt_param_scheduler)
        with timed("reading the checkpoint"), groups_at_any_rate(self.optimizer):
            super()._load_checkpoint()
        if folder is not None:
            self._restore(folder, saved)
            for line in ckpt.schedule_changes(asked, ckpt.schedule_of(self.opt_param_scheduler)):
                logger.warning(line)

    def _load_iteration(self):
        """The step, and into `args` the rows, after which a run goes on from the Hugging Face form of a checkpoint.

        ms-swift has the rows from common.pt, which megatron-core 0.19 does not write: the steps would go on and
        the data begin anew. And it looks into the given folder only, where a mixture's adapter has its own below.
        """
        args = self.args
        exported = args.adapters[0] if args.tuner_type != "full" and args.adapters else args.model
        home = ckpt.checkpoint_of(exported)
        if home is not None:
            saved = ckpt.read_state(home)
            args.consumed_train_samples = saved["consumed_train_samples"]
            return saved["iteration"]
        iteration = super()._load_iteration()
        if iteration and self._resume_folder() is None and not hasattr(args, "consumed_train_samples"):
            raise UserError(
                f"{exported} is of step {iteration} of a run, and nothing there says which rows that run has seen",
                field="--finetune",
                remedy="leave --finetune false out and begin at step 1, or go on with --mcore_adapter or --mcore_model",
            )
        return iteration

    def _check_same_model(self, folder: str, saved: dict[str, Any]) -> None:
        mine = self._model_identity()
        differing = [k for k in MODEL_KEYS if saved["model"].get(k) != mine[k]]
        if differing:
            what = ", ".join(f"{k} {saved['model'].get(k)} there and {mine[k]} here" for k in differing)
            raise UserError(
                f"the checkpoint is of another model: {what}",
                file=os.path.join(folder, ckpt.STATE_FILE),
                field="--mcore_adapter" if self.args.mcore_adapter else "--mcore_model",
                remedy="give the --model that the checkpoint was trained from",
            )

    def _check_same_tuner(self, folder: str, saved: dict[str, Any]) -> None:
        there, here = saved["tuner"], self._tuner_identity()
        differing = [k for k in here if there.get(k) != here[k]]
        if differing:
            what = ", ".join(f"{k} {there.get(k)} there and {here[k]} here" for k in differing)
            raise UserError(
                f"the checkpoint was trained in another way: {what}",
                file=os.path.join(folder, ckpt.STATE_FILE),
                field=f"--{differing[0]}",
                remedy="repeat the flags of the run that wrote it",
            )

    def _check_layout_change(self, folder: str, saved: dict[str, Any]) -> None:
        there, here = saved["layout"], self._layout_name()
        if self.args.no_load_optim:
            return
        if self.args.optimizer_cpu_offload and not saved["optimizer_reshardable"]:
            # What counts is how it was saved, not this run's flags.
            raise UserError(
                "the optimizer state was saved without --dist_ckpt_optim_fully_reshardable true, and an optimizer on "
                "the host would forget Adam's step",
                file=os.path.join(folder, ckpt.STATE_FILE),
                field="--optimizer_cpu_offload",
                remedy="give up the optimizer state with --no_load_optim true",
            )
        experts = bool(saved["model"].get("num_experts"))
        if _has_expert_optimizer(there, experts) != _has_expert_optimizer(here, experts):
            raise UserError(
                "experts have an optimizer of their own only where EP or TP is above 1, so the state of "
                f"EP {there['ep']}, TP {there['tp']} there and EP {here['ep']}, TP {here['tp']} here differs",
                file=os.path.join(folder, ckpt.STATE_FILE),
                remedy="resume with EP above 1 on both sides or on neither, or give up the optimizer state with "
                "--no_load_optim true",
            )
        changed = [k for k in ("tp", "pp", "vpp", "ep", "etp") if there[k] != here[k]]
        if changed and not saved["optimizer_reshardable"]:
            what = ", ".join(f"{k.upper()} {there[k]} there and {here[k]} here" for k in changed)
            raise UserError(
                f"the optimizer state was saved for another layout ({what}) and cannot be cut anew",
                file=os.path.join(folder, ckpt.STATE_FILE),
                remedy="save with --dist_ckpt_optim_fully_reshardable true, resume in the old layout, or give up the "
                "optimizer state with --no_load_optim true",
            )

    def _restore(self, folder: str, saved: dict[str, Any]) -> None:
        state = self.state
        state.best_metric = saved["best_metric"]
        state.best_global_step = saved["best_global_step"]
        state.best_model_checkpoint = saved["best_model_checkpoint"]
        if "patience" in saved:  # not in checkpoints of 2026-10 and before
            self.patience.load_state_dict(saved["patience"])
        if self.estimator is not None and saved["estimator"] is not None:
            try:
                self.estimator.load_state_dict(saved["estimator"])
            except ValueError as e:
                raise UserError(
                    f"the estimate of alpha is damaged: {e}",
                    file=os.path.join(folder, ckpt.STATE_FILE),
                    remedy="go on from an older checkpoint",
                ) from None
            self.alpha = self.estimator.alpha
        if saved["layout"] == self._layout_name() and not self.args.no_load_rng:
            ckpt.restore_random_state(ckpt.load_random_state(folder, dist.get_rank()))
        elif not self.args.no_load_rng:
            logger.info(
                f"The checkpoint was written in another layout ({saved['layout']}): random states are not "
                "restored, so dropout masks differ from those of an uninterrupted run."
            )
        logger.info(f"Going on from step {saved['iteration']} of {folder}.")


def _has_expert_optimizer(layout: dict[str, int], experts: bool) -> bool:
    """Megatron keeps experts apart where their replicas are other ranks than the dense weights' replicas."""
    return experts and (layout["ep"] > 1 or layout["tp"] != layout["etp"])
