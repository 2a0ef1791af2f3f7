"""Saving and resuming: whole checkpoints, and the state to go on from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from swift.utils import get_logger, is_master

from megatron_bvpo.errors import UserError
from megatron_bvpo.host import checkpoint as ckpt
from megatron_bvpo.host.patches import groups_at_any_rate
from megatron_bvpo.host.peft_export import is_due, set_aside, write_peft_form
from megatron_bvpo.host.phases import tell, timed
from megatron_bvpo.launching.new_layers import carry_along

logger = get_logger()

MODEL_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_experts")
LORA_KEYS = ("tuner_type", "lora_rank", "lora_alpha", "use_rslora", "target_modules")


class Stateful(Protocol):
    """A part of a run whose state a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        args: ms-swift's arguments.
        config: the Hugging Face model's configuration.
        state: ms-swift's trainer state.
        bridge: mcore-bridge's, whose `save_weights` gets a line of its own in the log.
        optimizer, scheduler: what is restored from Megatron's files.
        mixture: weights of the streams, and what they are estimated from.
        patience: for how long the held-out metric has not become better.
        loss: the preference loss, for people.
        files: around ms-swift's writing and reading: what is trained whole beside adapters.
    """

    def __init__(
        self,
        args,
        config,
        state,
        bridge,
        optimizer,
        scheduler,
        *,
        mixture: Stateful,
        patience: Stateful,
        loss: Mapping[str, Any],
        files: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.args, self.config, self.state, self.bridge = args, config, state, bridge
        self.optimizer, self.scheduler = optimizer, scheduler
        self.mixture, self.patience, self.loss, self.files = mixture, patience, loss, files

    # ---- saving

    def save(
        self, write: Callable[[], None], flush: Callable[[], None], oldest_first: Callable[[str], list[str]]
    ) -> float:
        """Write a checkpoint aside and publish it; only then the adapter's form for peft, which no restart needs.

        Args:
            write: ms-swift's `save_checkpoint`.
            flush: writes what has to be on disk before the checkpoint is: reference log-probs.
            oldest_first: ms-swift's order in which the checkpoints of a folder are removed.

        Returns:
            Seconds.
        """
        began = time.monotonic()
        args, state = self.args, self.state
        output_dir = args.output_dir
        staging = Path(output_dir) / ckpt.STAGING
        # Writing files may draw random numbers, on some ranks only; the run goes on from this state, saved or not.
        random_state = ckpt.random_state()
        if is_master():
            ckpt.open_staging(output_dir)
        with timed("save: reference log-probs"):
            flush()
            dist.barrier()
        args.output_dir = str(staging)
        try:
            told = "save: Megatron's files, and the lines of save_weights"
            with timed(told, self.bridge, "save_weights"), self.files():
                write()
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
                for exported in staging.glob("*/config.json"):
                    old_as_they_were = args.bvpo_new_layers_only and args.tuner_type == "full"
                    carry_along(Path(args.model_info.model_dir), exported.parent, old_as_they_were)
                ckpt.write_state(staging / name, self._saved_state())
                ckpt.publish(staging, name)
                self.rotate(oldest_first(output_dir))
            tell("save: all that a restart needs", time.monotonic() - began)
            logger.info(f"The checkpoint is whole: {state.last_model_checkpoint}")
            write_peft_forms(output_dir, self.config)
        ckpt.restore_random_state(random_state)
        dist.barrier()
        seconds = time.monotonic() - began
        tell("save: all of it", seconds)
        return seconds

    def rotate(self, oldest_first: list[str]) -> None:
        """As ms-swift's, but a checkpoint whose removal was cut short does not look whole."""
        if self.args.save_total_limit:
            ckpt.rotate(oldest_first, self.args.save_total_limit)

    def _saved_state(self) -> dict[str, Any]:
        """What bvpo_state.json holds besides its format."""
        state = self.state
        return {
            "iteration": state.iteration,
            "consumed_train_samples": state.consumed_train_samples,
            **self.mixture.state_dict(),
            "optimizer_reshardable": self._optimizer_reshardable(),
            "best_metric": state.best_metric,
            "best_global_step": state.best_global_step,
            "best_model_checkpoint": state.best_model_checkpoint,
            "patience": self.patience.state_dict(),
            "layout": self._layout_name(),
            "model": self._model_identity(),
            "tuner": self._tuner_identity(),
            "loss": dict(self.loss),
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
        config = self.config
        config = getattr(config, "text_config", None) or config
        return {key: getattr(config, key, None) for key in MODEL_KEYS}

    def _tuner_identity(self) -> dict[str, Any]:
        args = self.args
        found = {key: getattr(args, key) for key in (LORA_KEYS if args.tuner_type != "full" else ("tuner_type",))}
        # None, as checkpoints have it that know nothing of it.
        return found | {"bvpo_new_layers_only": args.bvpo_new_layers_only or None}

    # ---- resuming

    def _resume_folder(self) -> str | None:
        args = self.args
        if args.finetune:
            return None
        # With LoRA, --mcore_model may name the base model in Megatron's format.
        return args.mcore_adapter or (args.mcore_model if args.tuner_type == "full" else None)

    def load(self, read: Callable[[], None]) -> None:
        """Read the checkpoint that the run goes on from, if there is one; `read` is ms-swift's `_load_checkpoint`."""
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
        asked = ckpt.schedule_of(self.scheduler)
        with timed("reading the checkpoint"), groups_at_any_rate(self.optimizer), self.files():
            read()
        if folder is not None:
            self._restore(folder, saved)
            for line in ckpt.schedule_changes(asked, ckpt.schedule_of(self.scheduler)):
                logger.warning(line)

    def iteration(self, stock: Callable[[], int]) -> int:
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
        iteration = stock()
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
        try:
            self.mixture.load_state_dict(saved)
        except ValueError as e:
            raise UserError(
                f"the estimate of alpha is damaged: {e}",
                file=os.path.join(folder, ckpt.STATE_FILE),
                remedy="go on from an older checkpoint",
            ) from None
        if saved["layout"] == self._layout_name() and not self.args.no_load_rng:
            ckpt.restore_random_state(ckpt.load_random_state(folder, dist.get_rank()))
        elif not self.args.no_load_rng:
            logger.info(
                f"The checkpoint was written in another layout ({saved['layout']}): random states are not "
                "restored, so dropout masks differ from those of an uninterrupted run."
            )
        logger.info(f"Going on from step {saved['iteration']} of {folder}.")


def write_peft_forms(output_dir: str, config) -> None:
    """Of the last checkpoint, and of older ones whose save was cut short behind their publication."""
    for folder in reversed(ckpt.whole_checkpoints(Path(output_dir))):
        if is_due(folder):
            with timed(f"save: the adapter of {folder.name} in peft's form"):
                write_peft_form(folder, config)


def _has_expert_optimizer(layout: dict[str, int], experts: bool) -> bool:
    """Megatron keeps experts apart where their replicas are other ranks than the dense weights' replicas."""
    return experts and (layout["ep"] > 1 or layout["tp"] != layout["etp"])
