"""`BvpoConfig`: what BVPO does in a run, frozen, from argument values that have been checked one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.stream_flags import StreamSettings, read_streams
from megatron_bvpo.objective.demonstrations import TOKEN_LOSSES
from megatron_bvpo.objective.own_loss import own_function
from megatron_bvpo.objective.preference import LOSS_TYPES, PreferenceConfig
from megatron_bvpo.objective.schedule import MuSchedule
from megatron_bvpo.objective.stream_losses import StreamLosses
from megatron_bvpo.objective.unpaired import UNPAIRED_LOSS_TYPES, UnpairedConfig
from megatron_bvpo.streams import estimators


@dataclass(frozen=True)
class BvpoConfig:
    """What BVPO does in this run.

    Attributes:
        streams: those that are run, in the table's order.
        probes: the weights of those that estimate are measured.
        start_weights: their weights: fixed, or where the measurement starts. Trace and empty are both named where one
            alpha says what the two count.
        alpha_prior: where the estimate of alpha starts and what it shrinks to.
        schedule: share of demonstrations over the steps, or None: there are none, or a gate chooses.
        gate_threshold: of the gate, or None.
        expert_loss: of demonstrations.
        criterion, kappa: `mse`, or `sgd` with kappa = learning rate × smoothness, in (0, 1].
        probe_interval: optimizer steps between two measurements of the moments.
        moment_decay: decay of what is measured, per probe.
        empty: what rows without own empty-trace answers get: `strip`, `require` or `own`.
        empty_block: text of an empty trace, or None: the template's own.
        logp_impl: implementation of the log-probs.
        logp_memory: GiB that their tiles of logits may take on a GPU.
        new_layers_only: train the layers that `bvpo expand` has added; the model without them is the reference.
        ref_cache: folder of reference log-probs, or None.
        refs_only: compute those of every row and train nothing.
        eval_on_start: evaluate once before the first step.
        preference: the base loss.
    """

    streams: tuple[str, ...]
    probes: bool
    start_weights: dict[str, float]
    alpha_prior: float
    schedule: MuSchedule | None
    gate_threshold: float | None
    expert_loss: str | Callable
    criterion: str
    kappa: float
    probe_interval: int
    moment_decay: float
    empty: str
    empty_block: str | None
    logp_impl: str
    logp_memory: float
    new_layers_only: bool
    ref_cache: str | None
    refs_only: bool
    eval_on_start: bool
    preference: PreferenceConfig | UnpairedConfig

    @property
    def unpaired(self) -> bool:
        """The loss takes single responses with a label."""
        return isinstance(self.preference, UnpairedConfig)

    @property
    def losses(self) -> StreamLosses:
        own = own_function(self.preference.loss_type, (*LOSS_TYPES, *UNPAIRED_LOSS_TYPES), "--loss_type")
        return StreamLosses(self.preference, self.streams, self.expert_loss, own if callable(own) else None)

    @property
    def eval_weights(self) -> dict[str, float]:
        """The weights of `eval_loss`: fixed over a run, so that checkpoints can be compared. Demonstrations count only
        where there is nothing else."""
        return self.start_weights or dict.fromkeys(self.streams, 1.0)


STREAM_FLAGS = ("bvpo_streams", "bvpo_weights", "bvpo_alpha")


def bvpo_config(values: dict[str, Any]) -> BvpoConfig:
    """The frozen configuration from argument values (`vars(args)`) whose ranges `check_values` has checked.

    Raises UserError for values that do not go together.
    """
    prior = float(values["bvpo_alpha_prior"])
    streams = read_streams(values["bvpo_streams"], values["bvpo_weights"], values["bvpo_alpha"], prior)
    try:
        preference = preference_settings(values)
    except ValueError as e:
        name = str(e).split()[0]
        flag = f"bvpo_{name}" if name in ("empty_beta", "short_beta") else name
        raise UserError(str(e), field=f"--{flag}", remedy=f"see the README's table of losses for --{name}") from None
    refuse_useless_cache(values, preference)
    refuse_idle_flags(values, streams)
    return BvpoConfig(
        streams=streams.streams,
        probes=streams.measured,
        start_weights=streams.weights,
        alpha_prior=prior,
        **demonstration_settings(values, streams),
        criterion=values["bvpo_criterion"],
        kappa=float(values["bvpo_kappa"]),
        probe_interval=int(values["bvpo_probe_interval"]),
        moment_decay=float(values["bvpo_moment_decay"]),
        empty=values["bvpo_empty"],
        empty_block=values["bvpo_empty_block"],
        logp_impl=values["bvpo_logp_impl"],
        logp_memory=float(values["bvpo_logp_memory"]),
        new_layers_only=bool(values["bvpo_new_layers_only"]),
        ref_cache=values["bvpo_ref_cache"] or None,
        refs_only=bool(values["bvpo_refs_only"]),
        eval_on_start=bool(values["bvpo_eval_on_start"]),
        preference=preference,
    )


def preference_settings(values: dict[str, Any]) -> PreferenceConfig | UnpairedConfig:
    """The loss of the streams that estimate; raises ValueError, or UserError for settings of the other kind of loss."""
    single = values["loss_type"] in UNPAIRED_LOSS_TYPES
    unused = {"label_smoothing": 0.0, "rpo_alpha": 0.0, "reference_free": False, "bvpo_short_beta": None}
    unused = unused if single else {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    for name, default in unused.items():
        if (values[name] or default) != default:
            kinds = ("single responses", "pairs") if single else ("pairs", "single responses (kto)")
            raise UserError(
                f"is {values[name]}, and --loss_type {values['loss_type']} is a loss of {kinds[0]}",
                field=f"--{name}",
                remedy=f"leave the flag out: it belongs to losses of {kinds[1]}",
            )
    betas = {"beta": float(values["beta"]), "empty_beta": _number(values["bvpo_empty_beta"])}
    if single:
        weights = {name: float(values[name]) for name in ("desirable_weight", "undesirable_weight")}
        return UnpairedConfig(values["loss_type"], **betas, **weights)
    return PreferenceConfig(
        loss_type=values["loss_type"],
        **betas,
        short_beta=_number(values["bvpo_short_beta"]),
        label_smoothing=float(values["label_smoothing"]),
        rpo_alpha=float(values["rpo_alpha"] or 0.0),
        reference_free=bool(values["reference_free"]),
        simpo_gamma=float(values["bvpo_simpo_gamma"]),
    )


def demonstration_settings(values: dict[str, Any], streams: StreamSettings) -> dict[str, Any]:
    """The fields of BvpoConfig that are about demonstrations; raises UserError."""
    demonstrates, gated = streams.streams != estimators(streams.streams), values["bvpo_gate"] == "hpt"
    if gated and not (demonstrates and streams.weights):
        raise UserError(
            f"is hpt, which chooses between demonstrations and pairs; the streams are {', '.join(streams.streams)}",
            field="--bvpo_gate",
            remedy="add expert to --bvpo_streams, beside a stream of pairs",
        )
    try:
        names = ("peak", "valley", "warmup_steps", "decay_steps")
        schedule = MuSchedule(**{name: values[f"bvpo_mu_{name}"] for name in names})
    except ValueError as e:
        raise UserError(str(e), field=f"--bvpo_{str(e).split()[0]}") from None
    return {
        "schedule": schedule if demonstrates and streams.weights and not gated else None,
        "gate_threshold": float(values["bvpo_gate_threshold"]) if gated else None,
        "expert_loss": own_function(values["bvpo_expert_loss"], TOKEN_LOSSES, "--bvpo_expert_loss"),
    }


def refuse_idle_flags(values: dict[str, Any], streams: StreamSettings) -> None:
    """Flags of streams, of a schedule or of a gate that this run does not have; raises UserError for the first."""
    names, gated = streams.streams, values["bvpo_gate"] == "hpt"
    demonstrates, pairs = names != estimators(names), bool(streams.weights)
    scheduled = demonstrates and pairs and not gated
    moves = bool(values["bvpo_mu_warmup_steps"] or values["bvpo_mu_decay_steps"])
    peak = values["bvpo_mu_peak"]
    no_schedule = "there is no schedule: it weighs demonstrations beside pairs, where no gate chooses"
    idle = [
        ("bvpo_mu_valley", 0.1, scheduled, no_schedule),
        ("bvpo_mu_warmup_steps", 0, scheduled, no_schedule),
        ("bvpo_mu_decay_steps", 0, scheduled, no_schedule),
        ("bvpo_mu_peak", 0.1, scheduled, no_schedule),
        (
            "bvpo_mu_peak",
            values["bvpo_mu_valley"],
            moves or peak == 0.1,
            "without --bvpo_mu_warmup_steps and --bvpo_mu_decay_steps the share is --bvpo_mu_valley throughout",
        ),
        ("bvpo_gate_threshold", 0.0, gated, "there is no --bvpo_gate"),
        ("bvpo_expert_loss", "sft", demonstrates, "--bvpo_streams has no expert"),
        ("bvpo_empty_beta", None, "empty" in names, "the empty stream is not run"),
        ("bvpo_short_beta", None, "short" in names, "the short stream is not run"),
        ("loss_type", "sigmoid", pairs, "--bvpo_streams has no pairs"),
    ]
    for name, default, used, why in idle:
        if not used and values[name] != default:
            raise UserError(f"is {values[name]}, and nothing would read it: {why}", field=f"--{name}")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def refuse_useless_cache(values: dict[str, Any], preference: PreferenceConfig | UnpairedConfig) -> None:
    """A cache that nothing would be read from, or values that nobody would keep."""
    if values["bvpo_refs_only"] and not values["bvpo_ref_cache"]:
        raise UserError(
            "there is no folder to write reference log-probs to",
            field="--bvpo_ref_cache",
            remedy="name a folder that the later runs see, too",
        )
    if values["bvpo_refs_only"] and values["streaming"]:
        raise UserError(
            "a stream has no end that is known ahead",
            field="--streaming",
            remedy="train with --bvpo_ref_cache: the run writes the values itself",
        )
    if values["bvpo_ref_cache"] and isinstance(preference, UnpairedConfig):
        raise UserError(
            f"is given, and --loss_type {preference.loss_type} takes single responses: the cache keeps pairs",
            field="--bvpo_ref_cache",
            remedy="leave the flag out",
        )
    demonstrations_alone = not estimators(read_streams(*(values[name] for name in STREAM_FLAGS)).streams)
    if values["bvpo_ref_cache"] and (demonstrations_alone or not preference.uses_reference):
        flag = "reference_free" if preference.reference_free else "loss_type"
        flag = "bvpo_streams" if demonstrations_alone else flag
        raise UserError(
            f"{flag} is {values[flag]!r}: this loss has no reference, so there is nothing to keep",
            field="--bvpo_ref_cache",
            remedy="leave the flag out",
        )
