"""The streams' weights in the mixed loss, and what is summed and reported of each. Pure.

L = (1 − m)·Σ_j w_j·L_j + m·L_x (MATH.md §1, §5, §6): L_j is a mean over the pairs of the **global** batch (arXiv
2510.05095), L_x a mean over the counted tokens of its demonstrations. A micro-batch holds any number of members of a
stream, so it contributes Σ_s w_s/N_s·Σ ℓ; a mean of micro-batch means would weigh a pair by the company it was packed
with, and a token by that of its sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_bvpo.objective.preference import PairLogps, PairLosses
from megatron_bvpo.objective.unpaired import ResponseLogps, ResponseLosses
from megatron_bvpo.streams import TABLE


def mixing_factors(weights: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Factor of each stream's **sum** of losses in the mixed loss: weight/N, or 0 without members in this batch.

    Args:
        weights: each stream's.
        counts: N_s, pairs of each stream in the global batch, or counted tokens of its demonstrations; members of
            weight 0 do not count.
    """
    return {name: weight / counts[name] if counts[name] else 0.0 for name, weight in weights.items()}


class _Sums:
    """Sums over a stream's members, one float64 scalar tensor each; adding two of these joins their members."""

    loss: Tensor

    @property
    def count(self) -> Tensor:
        """What the stream's loss is a mean over."""
        raise NotImplementedError

    def stack(self) -> Tensor:
        """[WIDTH] float64, detached; the inverse is `sums_of(stream, vector)`."""
        found = [getattr(self, f.name).detach().double() for f in fields(self)]
        return torch.stack(found + [found[0].new_zeros(())] * (WIDTH - len(found)))

    def metrics(self, *, rpo: bool) -> dict[str, tuple]:
        """Log names, without the stream's prefix, to (sum, count)."""
        raise NotImplementedError


@dataclass
class StreamSums(_Sums):
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

    @staticmethod
    def width() -> int:
        return len(fields(StreamSums))

    @property
    def count(self) -> Tensor:
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
        found = {
            "logps/chosen": (self.chosen_logps, self.pairs),
            "logps/rejected": (self.rejected_logps, self.pairs),
            "rewards/chosen": (self.chosen_rewards, self.pairs),
            "rewards/rejected": (self.rejected_rewards, self.pairs),
            "rewards/accuracies": (self.accuracies, self.pairs),
            "rewards/margins": (self.margins, self.pairs),
        }
        return found | ({"nll_loss": (self.nll, self.pairs)} if rpo else {})


@dataclass
class ResponseSums(_Sums):
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


@dataclass
class DemonstrationSums(_Sums):
    """Of a stream that demonstrates: over counted tokens, and over whole responses."""

    tokens: Tensor
    loss: Tensor
    logps: Tensor
    responses: Tensor

    @property
    def count(self) -> Tensor:
        return self.tokens

    @staticmethod
    def of(losses_P: Tensor, logps_P: Tensor, tokens_P: Tensor, weights_P: Tensor) -> DemonstrationSums:
        """Weighted sums over P demonstrations, from each one's summed token losses and log-probs; weight 0: nothing."""

        def total(values_P: Tensor) -> Tensor:
            return torch.where(weights_P > 0, weights_P * values_P.double(), 0.0).sum()

        return DemonstrationSums(total(tokens_P), total(losses_P), total(logps_P.detach()), weights_P.sum())

    def metrics(self, *, rpo: bool) -> dict[str, tuple]:
        return {"nll_loss": (-self.logps, self.tokens), "logps/response": (self.logps, self.responses)}


WIDTH = StreamSums.width()


def sums_of(stream: str, vector_K: Sequence[Tensor], *, unpaired: bool = False) -> _Sums:
    """The sums of a stream from what `stack` made of them; `unpaired`: its loss takes single responses."""
    estimates = ResponseSums if unpaired else StreamSums
    kind = estimates if TABLE[stream].estimates else DemonstrationSums
    return kind(*vector_K[: len(fields(kind))])


def stream_metrics(sums: Mapping[str, _Sums], weights: Mapping[str, float], *, rpo: bool) -> dict[str, tuple]:
    """Log names to (sum, count); the trace stream keeps ms-swift's DPO names, the others' begin with their own.

    `loss` is the mixed loss of these members at `weights`; streams that these lack are not mixed in. A stream without
    members reports nothing.
    """
    metrics: dict[str, tuple] = {}
    means = {name: s.loss / s.count for name, s in sums.items() if s.count > 0}
    mixed = [weights[name] * mean for name, mean in means.items() if name in weights]
    if mixed:
        metrics["loss"] = (sum(mixed), 1)
    for name in means:
        prefix = TABLE[name].log_prefix
        metrics[f"loss/{name}"] = (sums[name].loss, sums[name].count)
        metrics |= {f"{prefix}{key}": value for key, value in sums[name].metrics(rpo=rpo).items()}
    return metrics
