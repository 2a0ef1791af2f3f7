"""Pair log-probs to preference losses and rewards. Pure.

Shapes: P pairs. All tensors are float64 [P].

Sources: DPO (arXiv 2305.18290), its hinge form SLiC (2305.10425), IPO (2310.12036, length-normalised as
in TRL), SimPO (2405.14734), the RPO term (2404.19733), DPO of log-ratios a token (`sigmoid_norm`: Tülu 3,
2411.15124, and TRL). With a trace in the response these are BVPO's trace loss, with an empty trace its empty-trace
loss (arXiv 2510.05095).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "simpo")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "simpo")
_BY_TOKENS = ("sigmoid_norm", "ipo", "simpo")


@dataclass(frozen=True)
class PreferenceConfig:
    """Which preference loss, and its constants.

    Attributes:
        loss_type: one of LOSS_TYPES, or module:function of a user's own, which own_loss.py loads.
        beta: the DPO temperature; for ipo the regularisation tau, for simpo the reward scale.
        label_smoothing: probability that a pair's label is wrong, in [0, 0.5); sigmoid, sigmoid_norm and simpo only.
        rpo_alpha: weight of the chosen response's mean negative log-likelihood, or 0.
        reference_free: score responses without the reference (its log-probs count as 0).
        simpo_gamma: SimPO's target margin, in units of the reward.
        empty_beta, short_beta: beta of the empty and of the short stream; None: the same.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    reference_free: bool = False
    simpo_gamma: float = 1.0
    empty_beta: float | None = None
    short_beta: float | None = None

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES and ":" not in self.loss_type:
            raise ValueError(f"loss_type is {self.loss_type!r}; BVPO knows {', '.join(LOSS_TYPES)}")
        for name in ("beta", "empty_beta", "short_beta"):
            beta = getattr(self, name)
            if beta is not None and not 0 < beta < math.inf:
                raise ValueError(f"{name} is {beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)")
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(f"label_smoothing has no meaning for loss_type {self.loss_type!r}; set it to 0")

    @property
    def uses_reference(self) -> bool:
        return not (self.reference_free or self.loss_type == "simpo")

    @property
    def length_normalised(self) -> bool:
        """True where the number of counted tokens changes the loss, so that shared tokens do not cancel."""
        return self.loss_type in _BY_TOKENS or bool(self.rpo_alpha) or ":" in self.loss_type

    def of(self, stream: str) -> PreferenceConfig:
        """The constants of one stream, by its name."""
        own = {"empty": self.empty_beta, "short": self.short_beta}.get(stream)
        return self if own is None else replace(self, beta=own)


@dataclass(frozen=True)
class PairLogps:
    """Sequence log-probs of P pairs; `ref_*` are None where the loss uses no reference."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass(frozen=True)
class PairLosses:
    """Per-pair results; `nll` is the chosen response's mean negative log-likelihood per token."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    nll: Tensor


def pair_losses(pairs: PairLogps, config: PreferenceConfig) -> PairLosses:
    """Loss and implicit rewards of each pair; gradients flow to `pairs.chosen` and `pairs.rejected`."""
    chosen, rejected = pairs.chosen, pairs.rejected
    if config.uses_reference:
        chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
    chosen_tokens, rejected_tokens = pairs.chosen_tokens.clamp(min=1), pairs.rejected_tokens.clamp(min=1)
    if config.loss_type in _BY_TOKENS:
        chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens
    margin = chosen - rejected

    beta, smoothing = config.beta, config.label_smoothing
    if config.loss_type == "hinge":
        loss = torch.relu(1 - beta * margin)
    elif config.loss_type == "ipo":
        loss = (margin - 1 / (2 * beta)) ** 2
    else:
        logits = beta * margin - (config.simpo_gamma if config.loss_type == "simpo" else 0.0)
        loss = -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
    nll = -pairs.chosen / chosen_tokens
    if config.rpo_alpha:
        loss = loss + config.rpo_alpha * nll
    return PairLosses(loss, (beta * chosen).detach(), (beta * rejected).detach(), nll)


def with_rewards(loss: Tensor, pairs: PairLogps, config: PreferenceConfig) -> PairLosses:
    """A loss of a user's own, with DPO's implicit rewards beside it."""
    chosen, rejected = pairs.chosen, pairs.rejected
    if config.uses_reference:
        chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
    rewards = (config.beta * side.detach() for side in (chosen, rejected))
    return PairLosses(loss.double(), *rewards, -pairs.chosen / pairs.chosen_tokens.clamp(min=1))
