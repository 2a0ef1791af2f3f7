"""Losses of single responses that are known to be right or wrong, and what is summed of them. Pure.

Shapes: R responses of a stream in a micro-batch, M mismatched ones. All tensors are float64 unless said otherwise.

Sources: KTO (arXiv 2402.01306, equations 7 and 8), the unpaired form of APO-zero (2408.06266), both as in TRL. TRL and
ms-swift take z from a micro-batch; here it is the stream's of the **global** batch, because the mean over one or two
responses is mostly noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNPAIRED_LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True)
class UnpairedConfig:
    """Which loss of single responses, and its constants.

    Attributes:
        loss_type: one of UNPAIRED_LOSS_TYPES.
        beta: how far a log-ratio of the policy to the reference goes towards the loss's ends.
        desirable_weight, undesirable_weight: factors of the losses of right and of wrong responses; names and meaning
            are ms-swift's and TRL's. KTO's authors keep desirable·(number of right ones) to undesirable·(number of
            wrong ones) between 1 and 4/3.
        empty_beta: beta of the empty stream; None: the same.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    empty_beta: float | None = None

    def __post_init__(self):
        if self.loss_type not in UNPAIRED_LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}; expected {', '.join(UNPAIRED_LOSS_TYPES)}")
        for name in ("beta", "desirable_weight", "undesirable_weight", "empty_beta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0")

    @property
    def uses_baseline(self) -> bool:
        """Whether the loss compares with z, which takes a pass of its own over mismatched responses."""
        return self.loss_type == "kto"

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def rpo_alpha(self) -> float:
        """These losses have no RPO term."""
        return 0.0

    def of(self, stream: str) -> UnpairedConfig:
        """The constants of one stream, by its name."""
        own = self.empty_beta if stream == "empty" else None
        return self if own is None else replace(self, beta=own)


@dataclass(frozen=True)
class ResponseLogps:
    """Sequence log-probs of R responses under policy and reference; `desirable` is bool."""

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    desirable: Tensor


@dataclass(frozen=True)
class ResponseLosses:
    """Per-response results; `rewards` are beta times the log-ratio to the reference, detached."""

    loss: Tensor
    rewards: Tensor


def kl_sums(policy_M: Tensor, reference_M: Tensor, weights_M: Tensor) -> Tensor:
    """[2] float64: sum of the log-ratios of mismatched responses, and their number; add these up over all ranks.

    Of weight 0 is what only fills a batch; its values may be anything.
    """
    ratios_M = torch.where(weights_M > 0, weights_M * (policy_M - reference_M).double(), 0.0)
    return torch.stack([ratios_M.sum(), weights_M.double().sum()]).detach()


def kl_baseline(sums: Tensor) -> Tensor:
    """z of a stream, a scalar, from `kl_sums` of the global batch: their mean, at least 0; 0 where there are none."""
    total, number = sums.unbind()
    return torch.where(number > 0, total / number.clamp(min=1), 0.0).clamp(min=0).detach()


def unpaired_losses(responses: ResponseLogps, z: Tensor | None, config: UnpairedConfig) -> ResponseLosses:
    """Loss and implicit reward of each response; gradients flow to `responses.policy`.

    kto: λ_D·(1 − σ(β(r − z))) for a right response, λ_U·(1 − σ(β(z − r))) for a wrong one; apo_zero_unpaired: the same
    with z = 0. r is the log-ratio of policy to reference.

    Args:
        z: scalar from `kl_baseline`; None where the loss has none.
    """
    if config.uses_baseline != (z is not None):
        raise ValueError(f"{config.loss_type} {'needs a' if config.uses_baseline else 'has no'} baseline")
    ratio = responses.policy - responses.reference
    gain = ratio if z is None else ratio - z.detach()
    # 1 − σ(x) = σ(−x), which keeps its digits where the loss is small.
    signed = torch.where(responses.desirable, -gain, gain)
    weights = ratio.new_tensor([config.undesirable_weight, config.desirable_weight])
    weight = weights[responses.desirable.long()]
    return ResponseLosses(weight * torch.sigmoid(config.beta * signed), (config.beta * ratio).detach())


@dataclass
class ResponseSums:
    """Of an estimator whose loss takes single responses: over all of them, and over the right and the wrong ones."""

    responses: Tensor
    loss: Tensor
    right: Tensor
    right_logps: Tensor
    wrong_logps: Tensor
    right_rewards: Tensor
    wrong_rewards: Tensor

    @property
    def count(self) -> Tensor:
        """What the stream's loss is a mean over."""
        return self.responses

    @staticmethod
    def of(logps: ResponseLogps, losses: ResponseLosses, weights_P: Tensor) -> ResponseSums:
        """Weighted sums over P responses; one of weight 0 adds nothing, even if its values are not finite."""
        right_P = torch.where(logps.desirable, weights_P, 0.0)

        def total(values_P: Tensor, weights_P: Tensor) -> Tensor:
            return torch.where(weights_P > 0, weights_P * values_P.double(), 0.0).sum()

        both = (right_P, weights_P - right_P)
        return ResponseSums(
            weights_P.sum(),
            total(losses.loss, weights_P),
            right_P.sum(),
            *(total(logps.policy.detach(), some_P) for some_P in both),
            *(total(losses.rewards, some_P) for some_P in both),
        )

    def metrics(self, *, rpo: bool) -> dict[str, tuple]:
        """ms-swift's names of KTO: chosen are the right ones, rejected the wrong ones."""
        wrong = self.responses - self.right
        found = {}
        for side, logps, rewards, number in (
            ("chosen", self.right_logps, self.right_rewards, self.right),
            ("rejected", self.wrong_logps, self.wrong_rewards, wrong),
        ):
            if number > 0:
                found |= {f"logps/{side}": (logps, number), f"rewards/{side}": (rewards, number)}
        if self.right > 0 and wrong > 0:
            found["rewards/margins"] = (self.right_rewards / self.right - self.wrong_rewards / wrong, 1)
        return found


def summed_responses(
    stream: str, logps: ResponseLogps, z: Tensor | None, config: UnpairedConfig, weights_P: Tensor
) -> tuple[Tensor, ResponseSums]:
    """([P] losses, their weighted sums) of a stream's responses; gradients flow through both.

    Args:
        z: as `unpaired_losses` takes it.
        config: the run's; the stream's constants are taken from it.
    """
    losses = unpaired_losses(logps, z, config.of(stream))
    return losses.loss, ResponseSums.of(logps, losses, weights_P)
