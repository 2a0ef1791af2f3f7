"""Values that are right by themselves and wrong together: told before anything is loaded, not by a later assertion."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from megatron_bvpo.data.verdicts import UNPAIRED
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.stream_flags import read_streams
from megatron_bvpo.streams import TABLE

TRACKERS = ("tensorboard", "wandb", "swanlab")
Rule = tuple[Any, str, str, str | None]


def check_combinations(args: Any, *, derived: bool = False) -> None:
    """Raise UserError for the first combination that cannot work.

    Args:
        args: an object with ms-swift's names as attributes.
        derived: ms-swift has filled in what was not given, so that nobody can tell any more what was.
    """
    given = () if derived else (_rates, _precision)
    for rules in (_length, _stream, *given, _columns, _saving, _early_stop, _elsewhere, _tuner):
        _raise_first(rules(args))
    check_recomputation(args)
    check_optimizer(args)
    check_trackers(args.report_to)


def _raise_first(rules: list[Rule]) -> None:
    for wrong, flag, problem, remedy in rules:
        if wrong:
            raise UserError(problem, field=f"--{flag}", remedy=remedy)


def _length(args: Any) -> list[Rule]:
    return [
        (
            args.streaming and args.train_iters is None,
            "train_iters",
            "is missing, and a stream has no end that is known ahead",
            "give the number of steps; with num_train_epochs too, the run ends with whichever comes first",
        ),
        (
            args.train_iters is None and args.num_train_epochs is None,
            "num_train_epochs",
            "is missing, and so is train_iters: how long is the run?",
            "give one of the two",
        ),
    ]


def _stream(args: Any) -> list[Rule]:
    if not args.streaming:
        return []
    return [
        (
            args.save_strategy == "epoch",
            "save_strategy",
            "is epoch, and how long an epoch of a stream is, nobody knows ahead",
            "use save_steps",
        ),
        (
            args.eval_iters < 0 and args.val_dataset,
            "eval_iters",
            "is missing, and a stream of held-out rows has no end that is known ahead",
            "give the number of batches that an evaluation takes, or 0",
        ),
        (args.lazy_tokenize, "lazy_tokenize", "is true, and a stream is always encoded as it comes", "leave it out"),
        (
            args.cached_dataset or args.cached_val_dataset,
            "streaming",
            "is true, and a cached data set is not streamed",
            "leave one of the two out",
        ),
        (
            args.group_by_length,
            "group_by_length",
            "is true, and the lengths of a stream are not known ahead",
            "leave one of the two out",
        ),
    ]


def check_warmup(args: Any) -> None:
    """The warm-up must end before the decay does; the number of steps may be known with the rows only."""
    decay = args.lr_decay_iters or args.train_iters
    if decay is None:
        return
    _raise_first(
        [
            (
                args.lr_warmup_fraction is None and args.lr_warmup_iters >= decay,
                "lr_warmup_iters",
                f"is {args.lr_warmup_iters}, and the learning rate ends after {decay} steps",
                f"give at most {decay - 1}, or --lr_warmup_fraction instead",
            ),
            (
                args.lr_decay_style == "WSD" and (args.lr_wsd_decay_iters or 0) > decay,
                "lr_wsd_decay_iters",
                f"is {args.lr_wsd_decay_iters}, and the learning rate ends after {decay} steps",
                f"give at most {decay}",
            ),
        ]
    )


def _rates(args: Any) -> list[Rule]:
    check_warmup(args)
    # ms-swift's own default, which it fills in later.
    lr = (1e-5 if args.tuner_type == "full" else 1e-4) if args.lr is None else args.lr
    start, end = args.start_weight_decay, args.end_weight_decay
    constant = args.weight_decay_incr_style == "constant"
    return [
        (args.min_lr > lr, "min_lr", f"is {args.min_lr}, above lr {lr}", "give less"),
        (args.lr_warmup_init > lr, "lr_warmup_init", f"is {args.lr_warmup_init}, above lr {lr}", "give less"),
        (
            args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None,
            "lr_wsd_decay_iters",
            "is missing, and lr_decay_style WSD needs it",
            "give the number of steps at the end in which the rate falls",
        ),
        (
            constant and (start is not None or end is not None),
            "start_weight_decay" if start is not None else "end_weight_decay",
            "is given, and weight_decay_incr_style constant has weight_decay only",
            "leave it out, or give --weight_decay_incr_style linear or cosine",
        ),
        (
            not constant and (start is None or end is None),
            "start_weight_decay" if start is None else "end_weight_decay",
            f"is missing, and weight_decay_incr_style {args.weight_decay_incr_style} needs it",
            None,
        ),
        (
            not constant and start is not None and end is not None and end < start,
            "end_weight_decay",
            f"is {end}, below start_weight_decay {start}",
            None,
        ),
    ]


def _precision(args: Any) -> list[Rule]:
    """bf16 and fp16 win over torch_dtype in ms-swift, fp16 over both, without a word."""
    dtype = str(args.torch_dtype).removeprefix("torch.") if args.torch_dtype is not None else None
    rules = [(args.fp16 and args.bf16, "fp16", "is true, and so is bf16", "leave one of the two out")]
    for flag, name in (("fp16", "float16"), ("bf16", "bfloat16")):
        rules.append(
            (
                getattr(args, flag) and dtype not in (None, name),
                "torch_dtype",
                f"is {dtype}, and {flag} true would win over it",
                f"give --{flag} false, or leave torch_dtype out",
            )
        )
    return rules


def _columns(args: Any) -> list[Rule]:
    return [
        (
            not args.remove_unused_columns,
            "remove_unused_columns",
            "is false, and the model's forward does not know the columns of the rows",
            "leave the flag out",
        )
    ]


def _saving(args: Any) -> list[Rule]:
    """What would end the run at its first save, or at its end."""
    return [
        (
            args.dist_ckpt_save_pre_mcore_014,
            "dist_ckpt_save_pre_mcore_014",
            "is true, and megatron-core 0.16 cannot save in that form",
            "leave the flag out; --dist_ckpt_optim_fully_reshardable true is what it was for",
        ),
        (
            args.create_checkpoint_symlink,
            "create_checkpoint_symlink",
            "is true, and ms-swift's links fail without an evaluation, and where a run ends for the second time",
            "leave the flag out: last-checkpoint always names the last whole checkpoint",
        ),
    ]


# What an evaluation measures (objective/streams.py).
_OF_PAIRS = ("logps/chosen", "logps/rejected", "nll_loss") + tuple(
    f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")
)
_OF_DEMONSTRATIONS = ("nll_loss", "logps/response")


def metrics_of(streams: Iterable[str], *, unpaired: bool = False) -> tuple[str, ...]:
    """Names of what every evaluation of these streams measures.

    Of single responses that is the loss: rewards of right ones are measured where some are right, of wrong ones alike.
    """
    found = ["loss"]
    for stream in map(TABLE.get, streams):
        names = (() if unpaired else _OF_PAIRS) if stream.estimates else _OF_DEMONSTRATIONS
        found += [f"loss/{stream.name}", *(f"{stream.log_prefix}{name}" for name in names)]
    return tuple(found)


def _early_stop(args: Any) -> list[Rule]:
    """A metric that is never measured where the run is saved would end it, or never do."""
    if getattr(args, "early_stop_interval", None) is None:
        return []
    flag, metric = "early_stop_interval", args.metric_for_best_model
    saves, evaluations = args.save_steps, args.eval_steps or args.save_steps
    streams = read_streams(args.bvpo_streams, args.bvpo_weights, args.bvpo_alpha).streams
    measured = metrics_of(streams, unpaired=args.loss_type in UNPAIRED)
    held_out = args.val_dataset or args.cached_val_dataset or args.split_dataset_ratio
    return [
        (not held_out or args.eval_iters == 0, flag, "there is nothing held out to measure", "give a --val_dataset"),
        (
            saves and evaluations and saves % evaluations,
            flag,
            f"save_steps {saves} is no multiple of eval_steps {evaluations}, and saves with an evaluation count",
            "give such steps",
        ),
        (
            metric not in (None, *measured),
            "metric_for_best_model",
            f"is {metric!r}, which no evaluation measures",
            f"names are {', '.join(measured)}",
        ),
    ]


def _elsewhere(args: Any) -> list[Rule]:
    """Flags of ms-swift's other backend, or of other models, that are there and do nothing."""
    images = [
        (getattr(args, flag) is not None, flag, "is for models that see images, and BVPO trains text", "leave it out")
        for flag in ("vit_lr", "aligner_lr")
    ]
    parallel = args.sequence_parallel_size
    return [
        (
            parallel not in (1, args.context_parallel_size),
            "sequence_parallel_size",
            f"is {parallel}; the Megatron backend splits sequences with context_parallel_size",
            f"give --context_parallel_size {parallel} instead",
        ),
        *images,
    ]


def _tuner(args: Any) -> list[Rule]:
    rules: list[Rule] = [
        (
            len(getattr(args, flag)) > 1,
            flag,
            f"names {len(getattr(args, flag))} adapters, and the Megatron backend takes one",
            "merge the others into the model first",
        )
        for flag in ("adapters", "ref_adapters")
        if isinstance(getattr(args, flag), list)
    ]
    for flag in ("target_modules", "modules_to_save", "freeze_parameters", "trainable_parameters"):
        values = getattr(args, flag)
        for value in values if isinstance(values, list) else []:
            rules.append(
                (
                    value.split() != [value],
                    flag,
                    f"has {value!r} as one name",
                    "write names as words of their own, not in one pair of quotes",
                )
            )
    return rules


def check_recomputation(args: Any) -> None:
    """ms-swift's and Megatron's rules."""
    granularity = args.recompute_granularity
    _raise_first(
        [
            (
                granularity == "full" and args.recompute_method is None,
                "recompute_method",
                f"is {args.recompute_method!r}; full recomputation needs uniform or block",
                "add --recompute_method uniform and --recompute_num_layers 1",
            ),
            (
                granularity == "full" and args.recompute_num_layers is None,
                "recompute_num_layers",
                "is missing; full recomputation needs it",
                "add --recompute_num_layers 1",
            ),
            *(
                (
                    granularity == "selective" and getattr(args, key) is not None,
                    key,
                    f"is {getattr(args, key)!r}, and Megatron takes none with selective recomputation",
                    "leave the flag out, or give --recompute_granularity full",
                )
                for key in ("recompute_method", "recompute_num_layers")
            ),
        ]
    )


def check_optimizer(args: Any) -> None:
    """Megatron's rules."""
    _raise_first(
        [
            (
                args.optimizer == "sgd",
                "optimizer",
                "is sgd: Megatron's distributed optimizer does not know it, and without that one its checkpoints "
                "cannot be loaded",
                "use --optimizer adam",
            ),
            (
                args.use_precision_aware_optimizer and not args.use_distributed_optimizer,
                "use_precision_aware_optimizer",
                "is True without the distributed optimizer, which Megatron refuses",
                "add --use_distributed_optimizer true",
            ),
            *(
                (
                    # ms-swift turns the names into torch's types later.
                    not args.use_precision_aware_optimizer
                    and str(getattr(args, name)) not in ("fp32", "torch.float32"),
                    name,
                    f"is {str(getattr(args, name)).removeprefix('torch.')}, and Megatron has that with the "
                    "precision-aware optimizer only",
                    "leave the flag out, or add --use_precision_aware_optimizer true",
                )
                for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
            ),
            (
                args.overlap_param_gather and not args.use_distributed_optimizer,
                "overlap_param_gather",
                "is True without the distributed optimizer, so there are no shards to gather",
                "leave the flag out, or give --use_distributed_optimizer true",
            ),
        ]
    )


def check_trackers(names: list[str] | str) -> None:
    """A tracker that is not installed would be missed after the model is loaded only."""
    for name in [names] if isinstance(names, str) else names:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"is {name}, which is not installed",
                field="--report_to",
                remedy=f"pip install {name}, or --report_to none",
            )
