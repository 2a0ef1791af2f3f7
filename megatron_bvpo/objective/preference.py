"""Pair log-probs to preference losses and rewards, and what is summed of them. Pure.

Shapes: P pairs. All tensors are float64 [P].

Sources: DPO (arXiv 2305.18290), its hinge form SLiC (2305.10425), IPO (2310.12036, length-normalised as
in TRL), SimPO (2405.14734), the RPO term (2404.19733), DPO of log-ratios a token (`sigmoid_norm`: Tülu 3,
2411.15124, and TRL). With a trace in the response these are BVPO's trace loss, with an empty trace its empty-trace
loss (arXiv 2510.05095).
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


@dataclass
class StreamSums:
    """Of an estimator: over pairs."""

    pairs: Tensor
    loss: Tensor
    nll: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    accuracies: Tensor
    margins: Tensor

    @property
    def count(self) -> Tensor:
        """What the stream's loss is a mean over."""
        return self.pairs

    @staticmethod
    def of(logps: PairLogps, losses: PairLosses, weights_P: Tensor) -> StreamSums:
        """Weighted sums over P pairs; a pair of weight 0 adds nothing, even if its values are not finite."""

        def total(values_P: Tensor) -> Tensor:
            return torch.where(weights_P > 0, weights_P * values_P.double(), 0.0).sum()

        # A tie counts half: with policy = reference every pair is one, and nothing is preferred yet.
        difference_P = losses.chosen_rewards - losses.rejected_rewards
        better = torch.heaviside(difference_P.double(), difference_P.new_full((), 0.5, dtype=torch.float64))
        return StreamSums(
            pairs=weights_P.sum(),
            loss=total(losses.loss),
            nll=total(losses.nll.detach()),
            chosen_logps=total(logps.chosen.detach()),
            rejected_logps=total(logps.rejected.detach()),
            chosen_rewards=total(losses.chosen_rewards),
            rejected_rewards=total(losses.rejected_rewards),
            accuracies=total(better),
            margins=total(difference_P),
        )

    def metrics(self, *, rpo: bool) -> dict[str, tuple]:
        """Log names, without the stream's prefix, to (sum, count)."""
        found = {
            "logps/chosen": (self.chosen_logps, self.pairs),
            "logps/rejected": (self.rejected_logps, self.pairs),
            "rewards/chosen": (self.chosen_rewards, self.pairs),
            "rewards/rejected": (self.rejected_rewards, self.pairs),
            "rewards/accuracies": (self.accuracies, self.pairs),
            "rewards/margins": (self.margins, self.pairs),
        }
        return found | ({"nll_loss": (self.nll, self.pairs)} if rpo else {})


def summed_pairs(
    stream: str,
    pairs: PairLogps,
    config: PreferenceConfig,
    weights_P: Tensor,
    own: Callable[[PairLogps, PreferenceConfig], Tensor] | None = None,
) -> tuple[Tensor, StreamSums]:
    """([P] losses, their weighted sums) of a stream's pairs; gradients flow through both.

    Args:
        config: the run's; the stream's constants are taken from it.
        own: a user's own loss, in place of that of `config`.
    """
    config = config.of(stream)
    losses = pair_losses(pairs, config) if own is None else with_rewards(own(pairs, config), pairs, config)
    return losses.loss, StreamSums.of(pairs, losses, weights_P)
