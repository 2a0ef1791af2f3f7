"""Which loss each stream of a run takes: from a micro-batch's responses to its members' losses and sums. Pure.

Shapes: Q sequences of a micro-batch, P members of a stream in it. All tensors are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_bvpo.objective.demonstrations import token_losses
from megatron_bvpo.objective.preference import PairLogps, PairLosses, PreferenceConfig, pair_losses, with_rewards
from megatron_bvpo.objective.streams import DemonstrationSums, ResponseSums, StreamSums
from megatron_bvpo.objective.unpaired import ResponseLogps, UnpairedConfig, unpaired_losses
from megatron_bvpo.streams import TABLE


@dataclass(frozen=True)
class Responses:
    """What is known of a micro-batch's sequences.

    Attributes:
        logps_Q, tokens_Q: log-prob of each response and the number of its counted tokens.
        ref_logps_Q: under the reference; None where no loss uses one.
        token_losses_Q: sums of the token losses of demonstrations; None where the micro-batch has none.
        right: by stream, whether its single responses are right ([P] bool); none where the loss takes pairs.
        baselines: by stream, z of the global batch; none where the loss has none.
    """

    logps_Q: Tensor
    ref_logps_Q: Tensor | None
    tokens_Q: Tensor
    token_losses_Q: Tensor | None = None
    right: Mapping[str, Tensor] = field(default_factory=dict)
    baselines: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamLosses:
    """The losses of a run.

    Attributes:
        preference: of the streams that estimate: of pairs, or of single responses.
        streams: of the run.
        expert_loss: of demonstrations: a name of objective/demonstrations.py, or a function of a user's own, from
            log-probs of tokens to their losses.
        own: a user's own loss of pairs, from (PairLogps, PreferenceConfig) to [P] losses; None: `preference`'s.
    """

    preference: PreferenceConfig | UnpairedConfig
    streams: tuple[str, ...]
    expert_loss: str | Callable[[Tensor], Tensor] = "sft"
    own: Callable[[PairLogps, PreferenceConfig], Tensor] | None = None

    @property
    def uses_reference(self) -> bool:
        return self.preference.uses_reference and any(TABLE[stream].estimates for stream in self.streams)

    @property
    def unpaired(self) -> bool:
        """The loss of the streams that estimate takes single responses."""
        return isinstance(self.preference, UnpairedConfig)

    @property
    def uses_baseline(self) -> bool:
        return self.unpaired and self.preference.uses_baseline

    def of_tokens(self, logps: Tensor) -> Tensor:
        """Losses of a demonstration's tokens, float64."""
        if callable(self.expert_loss):
            return self.expert_loss(logps.double())
        return token_losses(logps, self.expert_loss)

    def of(
        self, stream: str, responses: Responses, sides: Sequence[slice], weights_P: Tensor
    ) -> tuple[Tensor, StreamSums | ResponseSums | DemonstrationSums]:
        """([P] losses, their sums) of a stream's members, whose sequences stand in `sides`; gradients flow."""
        if not TABLE[stream].estimates:
            (part,) = sides
            found = [t[part] for t in (responses.logps_Q, responses.tokens_Q)]
            losses_P = found[0] if responses.token_losses_Q is None else responses.token_losses_Q[part]
            return losses_P, DemonstrationSums.of(losses_P, *found, weights_P)
        if self.unpaired:
            return self._of_single(stream, responses, sides[0], weights_P)
        chosen, rejected = sides
        ref_logps_Q = responses.ref_logps_Q
        pairs = PairLogps(
            chosen=responses.logps_Q[chosen],
            rejected=responses.logps_Q[rejected],
            ref_chosen=None if ref_logps_Q is None else ref_logps_Q[chosen],
            ref_rejected=None if ref_logps_Q is None else ref_logps_Q[rejected],
            chosen_tokens=responses.tokens_Q[chosen],
            rejected_tokens=responses.tokens_Q[rejected],
        )
        losses = self._of_pairs(pairs, self.preference.of(stream))
        return losses.loss, StreamSums.of(pairs, losses, weights_P)

    def _of_single(
        self, stream: str, responses: Responses, part: slice, weights_P: Tensor
    ) -> tuple[Tensor, ResponseSums]:
        values = (responses.logps_Q, responses.ref_logps_Q, responses.tokens_Q)
        logps = ResponseLogps(*(values_Q[part] for values_Q in values), responses.right[stream])
        losses = unpaired_losses(logps, responses.baselines.get(stream), self.preference.of(stream))
        return losses.loss, ResponseSums.of(logps, losses, weights_P)

    def _of_pairs(self, pairs: PairLogps, config: PreferenceConfig) -> PairLosses:
        if self.own is None:
            return pair_losses(pairs, config)
        return with_rewards(self.own(pairs, config), pairs, config)
