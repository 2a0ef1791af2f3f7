"""The loss of a micro-batch: log-probs of tokens → of sequences → losses of each stream's members → their weighted sum.
Pure.

For packed and padded batches, with context parallelism. The losses themselves are in preference.py, unpaired.py and
demonstrations.py: one call for each stream.

Shapes: B rows of a padded batch, L tokens of a row on this rank, T tokens of a pack on this rank, Q sequences of the
batch, P members of a stream in it, S streams, K sums of a stream.

Everything is summed in float64. At 32k tokens a float32 sum of a trace's log-probs is wrong in the
third digit of the difference to the reference, and that difference is all a preference loss sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bvpo.objective.demonstrations import DemonstrationSums, token_losses
from megatron_bvpo.objective.preference import PairLogps, PreferenceConfig, StreamSums, summed_pairs
from megatron_bvpo.objective.unpaired import ResponseLogps, ResponseSums, UnpairedConfig, summed_responses
from megatron_bvpo.streams import TABLE

if TYPE_CHECKING:
    from megatron_bvpo.data.batches import BatchLayout

IGNORE_INDEX = -100
Sums = StreamSums | ResponseSums | DemonstrationSums
WIDTH = max(len(fields(kind)) for kind in (StreamSums, ResponseSums, DemonstrationSums))


@dataclass(frozen=True)
class TokenLogps:
    """What policy and reference say of a micro-batch's tokens.

    Attributes:
        policy: log-probs of the label tokens, [1, T] of a pack or [B, L], float32 or wider. Values where the label is
            ignored may be anything, even NaN.
        labels: token ids aligned with `policy`; -100 marks tokens that do not count.
        reference: as `policy`; None where it is known, or no loss uses one.
        known_ref_Q: the reference's log-probs of the sequences, where the cache holds them all.
        seq_lens_Q: for a pack, the number of this rank's tokens of each sequence, int64; None for a padded batch.
        cp_group: group that holds the other parts of the same sequences, or None.
    """

    policy: Tensor
    labels: Tensor
    reference: Tensor | None = None
    known_ref_Q: Sequence[float] | None = None
    seq_lens_Q: Tensor | None = None
    cp_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Responses:
    """What is known of a micro-batch's sequences, float64.

    Attributes:
        logps_Q, tokens_Q: log-prob of each response and the number of its counted tokens.
        ref_logps_Q: under the reference; None where no loss uses one.
        token_losses_Q: sums of the token losses of demonstrations; None where the micro-batch has none.
        baselines: by stream, z of the global batch; none where the loss has none.
    """

    logps_Q: Tensor
    ref_logps_Q: Tensor | None
    tokens_Q: Tensor
    token_losses_Q: Tensor | None = None
    baselines: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchLoss:
    """Of one micro-batch.

    Attributes:
        loss: Σ factor · the stream's sum of losses; a float64 scalar through which gradients flow.
        sums: [S, K] float64, each stream's sums.
        finite: by stream, [P] bool: whether the losses of its members are finite, where they count.
        responses: what they were made of.
    """

    loss: Tensor
    sums: Tensor
    finite: dict[str, Tensor]
    responses: Responses


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

    def of_batch(
        self,
        tokens: TokenLogps,
        layout: BatchLayout,
        factors: Mapping[str, float],
        baselines: Mapping[str, Tensor],
    ) -> BatchLoss:
        """The weighted loss of a micro-batch.

        Args:
            layout: which sequences are whose.
            factors: of each stream's sum of losses; of those that it lacks, 0.
            baselines: by stream, z of the global batch.
        """
        responses = replace(self.responses(tokens), baselines=baselines)
        if any(layout.rows[stream] for stream in layout.tokens):
            responses = replace(responses, token_losses_Q=sequence_losses(tokens, self.of_tokens))
        total = responses.logps_Q.new_zeros(())
        sums, finite = [], {}
        for stream in layout.streams:
            losses_P, found = self.of(stream, responses, layout)
            finite[stream] = torch.isfinite(losses_P) | (responses.logps_Q.new_tensor(layout.weights[stream]) == 0)
            total = total + factors.get(stream, 0.0) * found.loss
            sums.append(stacked(found))
        return BatchLoss(total, torch.stack(sums), finite, responses)

    def responses(self, tokens: TokenLogps) -> Responses:
        """Token log-probs to sequence log-probs, of the policy and, where there is one, of the reference."""
        logps_Q, tokens_Q = sequence_logps(tokens.policy, tokens.labels, tokens.seq_lens_Q, tokens.cp_group)
        ref_logps_Q = None
        if tokens.reference is not None:
            ref_logps_Q, _ = sequence_logps(tokens.reference, tokens.labels, tokens.seq_lens_Q, tokens.cp_group)
        elif tokens.known_ref_Q is not None:
            ref_logps_Q = logps_Q.new_tensor(tokens.known_ref_Q)
        return Responses(logps_Q, ref_logps_Q, tokens_Q)

    def of(self, stream: str, responses: Responses, layout: BatchLayout) -> tuple[Tensor, Sums]:
        """([P] losses, their weighted sums) of a stream's members; gradients flow through both."""
        sides, weights_P = layout.slices(stream), responses.logps_Q.new_tensor(layout.weights[stream])
        values = (responses.logps_Q, responses.ref_logps_Q, responses.tokens_Q)
        if not TABLE[stream].estimates:
            (part,) = sides
            losses_Q = responses.logps_Q if responses.token_losses_Q is None else responses.token_losses_Q
            sums = DemonstrationSums.of(losses_Q[part], responses.logps_Q[part], responses.tokens_Q[part], weights_P)
            return losses_Q[part], sums
        if self.unpaired:
            right_P = torch.tensor(layout.right[stream], dtype=torch.bool, device=responses.logps_Q.device)
            logps = ResponseLogps(*(values_Q[sides[0]] for values_Q in values), right_P)
            return summed_responses(stream, logps, responses.baselines.get(stream), self.preference, weights_P)
        # Of log-probs, the reference's, and the numbers of tokens: the chosen's and the rejected's.
        of_sides = [None if values_Q is None else values_Q[side] for values_Q in values for side in sides]
        return summed_pairs(stream, PairLogps(*of_sides), self.preference, weights_P, self.own)

    def of_tokens(self, logps: Tensor) -> Tensor:
        """Losses of a demonstration's tokens, float64."""
        if callable(self.expert_loss):
            return self.expert_loss(logps.double())
        return token_losses(logps, self.expert_loss)


# ---- tokens to sequences


class _SumOverContextParallel(torch.autograd.Function):
    """All-reduce forward, identity backward: every rank's loss is the same function of the sum."""

    @staticmethod
    def forward(ctx, values: Tensor, group) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def sum_over_context_parallel(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum `values` over the context-parallel ranks; the gradient of the result passes through unchanged.

    The gradient of a rank's own tokens is then d(loss)/d(sum), as it should be: each rank holds other
    tokens of the same sequence, and Megatron adds the ranks' parameter gradients afterwards.
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    return _SumOverContextParallel.apply(values, group)


def sequence_sums(values: Tensor, seq_lens_Q: Tensor | None) -> Tensor:
    """Sum per-token values over each sequence.

    Args:
        values: [1, T] of a pack, or [B, L] of a padded batch; any float dtype.
        seq_lens_Q: for a pack, the number of this rank's tokens of each sequence, int64, on the device
            of `values`; tokens after the last sequence are padding. None for a padded batch.

    Returns:
        [Q] float64; differentiable.
    """
    if seq_lens_Q is None:
        return values.double().sum(dim=-1)
    # Not a scatter-add: a GPU adds its float64 terms in any order, and two runs would differ in the last bit.
    tokens_T = values[0].double()
    ends_Q = seq_lens_Q.cumsum(0)
    sequence_T = torch.searchsorted(ends_Q, torch.arange(tokens_T.numel(), device=tokens_T.device), right=True)
    numbers_Q = torch.arange(seq_lens_Q.numel(), device=tokens_T.device)
    return torch.where(sequence_T == numbers_Q[:, None], tokens_T, 0.0).sum(dim=-1)


def sequence_logps(
    logps: Tensor,
    labels: Tensor,
    seq_lens_Q: Tensor | None,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response, and the number of its tokens.

    Args:
        logps: log-probs of the label tokens, [1, T] or [B, L], float32 or wider. Values where the label
            is ignored may be anything, even NaN.
        labels: token ids aligned with `logps`; -100 marks tokens that do not count.
        seq_lens_Q: see `sequence_sums`.
        cp_group: group that holds the other parts of the same sequences, or None.

    Returns:
        (sums_Q, counts_Q), both float64 and equal on all ranks of `cp_group`.
    """
    counted = labels != IGNORE_INDEX
    logps = _counted_alone(logps, counted)
    sums_Q = sum_over_context_parallel(sequence_sums(logps, seq_lens_Q), cp_group)
    with torch.no_grad():
        counts_Q = sum_over_context_parallel(sequence_sums(counted.double(), seq_lens_Q), cp_group)
    return sums_Q, counts_Q


def sequence_losses(tokens: TokenLogps, token_losses: Callable[[Tensor], Tensor]) -> Tensor:
    """Each response's sum of token losses, [Q] float64, equal on all context-parallel ranks.

    Args:
        token_losses: log-probs of tokens → their losses, of the same shape; 0 where the log-prob is 0.
    """
    counted = tokens.labels != IGNORE_INDEX
    losses = _counted_alone(token_losses(_counted_alone(tokens.policy, counted)), counted)
    return sum_over_context_parallel(sequence_sums(losses, tokens.seq_lens_Q), tokens.cp_group)


def _counted_alone(values: Tensor, counted: Tensor) -> Tensor:
    """`values` with 0 where a token does not count, whatever stands there."""
    return torch.where(counted, values, torch.zeros((), dtype=values.dtype, device=values.device))


# ---- sums as numbers


def stacked(sums: Sums) -> Tensor:
    """[WIDTH] float64, detached: adding two of these joins their members. The inverse is `sums_of`."""
    found = [getattr(sums, f.name).detach().double() for f in fields(sums)]
    return torch.stack(found + [found[0].new_zeros(())] * (WIDTH - len(found)))


def sums_of(stream: str, vector_K: Sequence[Tensor], *, unpaired: bool = False) -> Sums:
    """The sums of a stream from what `stacked` made of them; `unpaired`: its loss takes single responses."""
    estimates = ResponseSums if unpaired else StreamSums
    kind = estimates if TABLE[stream].estimates else DemonstrationSums
    return kind(*vector_K[: len(fields(kind))])
