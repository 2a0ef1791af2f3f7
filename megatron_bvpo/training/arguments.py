"""Command-line arguments: ms-swift's Megatron RLHF flags, plus ours, all starting with `bvpo_`.

`BvpoArguments` belongs to the host; the rest of the project gets the frozen `BvpoConfig` instead.
"""

from __future__ import annotations

import errno
import math
import os
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

# Imported before swift.megatron.trainers: the other order breaks the argument parser of ms-swift 4.6.
import swift.megatron.pipelines.train.rlhf  # noqa: F401
from swift.agent_template import agent_template_map
from swift.megatron.arguments import MegatronRLHFArguments
from swift.megatron.callbacks import megatron_callbacks_map
from transformers import AutoConfig

from megatron_bvpo.data.shared_cache import spare_cores
from megatron_bvpo.errors import UserError
from megatron_bvpo.host.grown_layers import new_layer_numbers
from megatron_bvpo.host.timeouts import patient_until_the_first_step
from megatron_bvpo.launching.adapter_folders import check_adapters, use_readable_forms
from megatron_bvpo.launching.combinations import check_combinations, check_warmup
from megatron_bvpo.launching.layout_rules import check_layout, check_model_fits
from megatron_bvpo.launching.path_rules import (
    check_megatron_folder,
    check_paths,
    saved_without_optimizer,
)
from megatron_bvpo.launching.refusals import refuse_unsupported
from megatron_bvpo.launching.unread_flags import refuse_unread
from megatron_bvpo.launching.value_rules import check_values
from megatron_bvpo.objective.own_loss import is_own, own_function
from megatron_bvpo.objective.preference import LOSS_TYPES
from megatron_bvpo.objective.unpaired import UNPAIRED_LOSS_TYPES
from megatron_bvpo.training.config import BvpoConfig, bvpo_config

DEFAULT_BETA = {"simpo": 2.0, "sigmoid_norm": 5.0}


@dataclass
class BvpoArguments(MegatronRLHFArguments):
    """ms-swift's Megatron RLHF arguments with `rlhf_type bvpo` and the `bvpo_*` flags (README, "Flags")."""

    rlhf_type: Literal["dpo", "kto", "grpo", "gkd", "rm", "bvpo"] = "bvpo"
    bvpo_streams: list[str] = field(default_factory=lambda: ["trace", "empty"])
    bvpo_weights: list[str] = field(default_factory=list)
    bvpo_alpha: str = "auto"
    bvpo_alpha_prior: float = 0.5
    bvpo_criterion: Literal["mse", "sgd"] = "sgd"
    bvpo_kappa: float = 0.03
    bvpo_probe_interval: int = 10
    bvpo_moment_decay: float = 0.9
    bvpo_empty: Literal["strip", "require", "own"] = "strip"
    bvpo_empty_block: str | None = None
    bvpo_simpo_gamma: float = 1.0
    bvpo_empty_beta: float | None = None
    bvpo_short_beta: float | None = None
    bvpo_expert_loss: str = "sft"
    bvpo_mu_peak: float = 0.1
    bvpo_mu_valley: float = 0.1
    bvpo_mu_warmup_steps: int = 0
    bvpo_mu_decay_steps: int = 0
    bvpo_gate: Literal["none", "hpt"] = "none"
    bvpo_gate_threshold: float = 0.0
    bvpo_logp_impl: Literal["auto", "fused", "triton", "te", "torch"] = "auto"
    bvpo_logp_memory: float = 1.0
    bvpo_new_layers_only: bool = False
    bvpo_ref_cache: str | None = None
    bvpo_refs_only: bool = False
    bvpo_eval_on_start: bool = False

    # ms-swift's other backend has it, and its Megatron backend the metric's two flags.
    early_stop_interval: int | None = None

    # Megatron's native fusion casts the logits' gradient to bf16, whatever the dtype of the run.
    cross_entropy_loss_fusion: bool = False
    # ms-swift's 18,000,000 s would let a hang burn the whole allocation. Holds from the first step on; until then ranks
    # wait for rank 0 while it tokenises the data (host/timeouts.py).
    ddp_timeout: int = 1800
    # ms-swift's 1 lets all ranks wait while one core tokenises.
    dataset_num_proc: int = field(default_factory=spare_cores)

    def __post_init__(self):
        check_values(self)
        settle_preference_defaults(self)
        bvpo_config(vars(self))  # raises for bad settings before anything is loaded
        refuse_unread(vars(self))
        refuse_unsupported(self)
        check_combinations(self)
        check_resume(self)
        check_model_folders(self)
        check_paths(self)
        if self.report_to == ["none"]:  # as ms-swift's other backend has it
            self.report_to = []
        use_readable_forms(self)
        with as_user_error():
            super().__post_init__()
        check_names(self)

    @property
    def bvpo(self) -> BvpoConfig:
        return bvpo_config(vars(self))

    def _init_output_dir(self):
        if "RANK" not in os.environ:
            raise UserError(
                "this process was not started as a rank",
                field="NPROC_PER_NODE",
                remedy="set it to the number of ranks, one for each GPU: NPROC_PER_NODE=8 swift rlhf …",
            )
        self._check_layout()  # here, before ms-swift lets the ranks wait for each other
        try:
            with patient_until_the_first_step(self):
                super()._init_output_dir()
            if not os.access(self.output_dir, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as e:
            raise UserError(
                f"the output folder {self.output_dir} cannot be written: {e.strerror or e}",
                field="--output_dir",
                remedy="name a folder on a disk that every node can write",
            ) from None

    def _init_distributed(self):
        self._check_layout()  # both again: ms-swift has derived further settings by now
        refuse_unsupported(self)
        check_adapters(self)
        with patient_until_the_first_step(self):
            super()._init_distributed()

    def _check_layout(self):
        check_layout(self, int(os.environ.get("WORLD_SIZE", "1")))
        config = AutoConfig.from_pretrained(self.model_info.model_dir, trust_remote_code=True)
        check_model_fits(self, config)
        if self.bvpo_new_layers_only:
            new_layer_numbers(config, self.model_info.model_dir)

    def init_iters(self, train_dataset, val_dataset):
        asked_eval_iters = self.eval_iters
        with as_user_error():
            super().init_iters(train_dataset, val_dataset)
        if asked_eval_iters < 0 and hasattr(val_dataset, "__len__"):
            # Every held-out pair counts once: the last batch is filled up with pairs of weight 0.
            self.eval_iters = math.ceil(len(val_dataset) / self.global_batch_size)
        if not self.train_iters:
            items = "packs" if self.packing else "rows"
            raise UserError(
                f"{len(train_dataset)} {items} do not fill one global batch of {self.global_batch_size}",
                field="--global_batch_size",
                remedy="add rows, or lower --global_batch_size",
            )
        check_warmup(self)


@contextmanager
def as_user_error():
    """ms-swift's answer to arguments that it does not take, in one line, with the place that gave it."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if isinstance(e, RuntimeError) and not isinstance(e, NotImplementedError):
            raise  # torch's words for a network or a device that fails
        frame = traceback.extract_tb(e.__traceback__)[-1]
        said = " ".join(str(e).split())
        if not isinstance(e, (ValueError, AssertionError)) or not said:
            said = f"{type(e).__name__} {said}".strip()
        line = f": {frame.line}" if isinstance(e, AssertionError) and not str(e) else ""
        said = f"{said[:400]} …" if len(said) > 400 else said
        raise UserError(f"{said} ({frame.filename}:{frame.lineno}{line})") from e


def check_names(args) -> None:
    """Names that ms-swift looks up later only; plugins, which may add some, have been imported by now."""
    for name in args.callbacks:
        if name not in megatron_callbacks_map:
            raise UserError(f"has {name!r}; expected {', '.join(megatron_callbacks_map)}", field="--callbacks")
    if args.agent_template is not None and args.agent_template not in agent_template_map:
        raise UserError(
            f"is {args.agent_template!r}; expected {', '.join(agent_template_map)}", field="--agent_template"
        )
    config_class = getattr(args.megatron_model_meta, "config_cls", None)
    known = {field.name for field in fields(config_class)} if config_class else None
    for name in args.megatron_extra_kwargs or {}:
        if known is not None and name not in known:
            raise UserError(
                f"has {name!r}, which is no field of mcore-bridge's {config_class.__name__}",
                field="--megatron_extra_kwargs",
                remedy="its fields are those of megatron-core's TransformerConfig and a few more",
            )


def settle_preference_defaults(args) -> None:
    """ms-swift knows no defaults for a type of ours: sigmoid, and beta 0.1 (simpo: 2, sigmoid_norm: 5)."""
    args.loss_type = args.loss_type or "sigmoid"
    known = (*LOSS_TYPES, *UNPAIRED_LOSS_TYPES)
    if args.loss_type not in known and not is_own(args.loss_type):
        raise UserError(
            f"loss_type is {args.loss_type!r}; BVPO knows {', '.join(known)}, and module:function of your own",
            field="--loss_type",
            remedy="sigmoid is DPO's own loss",
        )
    own_function(args.loss_type, known, "--loss_type")  # here: before anything is loaded
    if args.beta is None:
        args.beta = DEFAULT_BETA.get(args.loss_type, 0.1)


def check_model_folders(args) -> None:
    """A path that is none would be looked up on the model hub; raises UserError instead."""
    for flag in ("model", "ref_model"):
        path = getattr(args, flag)
        if not path:
            continue
        if path.startswith(("/", "./", "../", "~")) and not os.path.isdir(path):
            remedy = "write it without ~" if path.startswith("~") else "check the path"
            raise UserError("no such folder", file=path, field=f"--{flag}", remedy=remedy)
        if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
            raise UserError(
                "the folder holds no config.json",
                file=path,
                field=f"--{flag}",
                remedy="name a folder with a Hugging Face model",
            )


def check_resume(args) -> None:
    """A checkpoint to go on from must be whole; raises UserError naming the newest whole one beside it."""
    from megatron_bvpo.host.checkpoint import require_whole_checkpoint

    if args.finetune:
        return
    # With LoRA, --mcore_model may name the base model in Megatron's format, which is no checkpoint of a run.
    flag = "mcore_adapter" if args.mcore_adapter or args.tuner_type != "full" else "mcore_model"
    folder = getattr(args, flag)
    if not folder:
        return
    require_whole_checkpoint(folder, flag=f"--{flag}")
    check_megatron_folder(folder, flag)
    if not args.no_load_optim and saved_without_optimizer(Path(folder)):
        raise UserError(
            f"{folder} was saved with no_save_optim, so there is no optimizer to go on with",
            field=f"--{flag}",
            remedy="with --no_load_optim true the moments and the rate's warm-up begin anew",
        )
