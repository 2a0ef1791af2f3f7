"""One pass of a step: reference and policy forward of each micro-batch, and the weighted loss of its members.

Megatron's schedule calls `forward` on every stage and `loss` on the last one. The reference's and the policy's
activations go through the pipeline joined along dim 0, so that one schedule serves both.

Shapes: P members of a stream in a micro-batch, Q sequences of it, S streams, K sums of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_bvpo.data.batches import ITEMS_KEY, LAYOUT_KEY, BatchLayout
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.objective.stream_losses import WIDTH, Responses, StreamLosses, TokenLogps, sequence_logps
from megatron_bvpo.training.canaries import Heard
from megatron_bvpo.training.referencing import REFERENCE_KEY, References

NOTHING: dict[str, float] = {}


@dataclass
class Pass:
    """What one forward (and backward) over the micro-batches needs to know, and what it found.

    Attributes:
        factors: factor of each stream's sum of losses; of those that it lacks, 0.
        loss_scale: undoes Megatron's division by micro-batches and data-parallel ranks.
        bad_rows: rows with a loss that is not finite, found on the last stage.
        reference_only: only the reference runs, to fill its cache.
        listening: the log-probs are wanted, for the canaries, and no loss; the reference runs even where it is known.
        heard: where log-probs of policy and reference are put, if somebody wants them.
        sums: [S, K] float64, each stream's sums on this rank; None off the last stage.
    """

    factors: Mapping[str, float]
    loss_scale: float
    bad_rows: list[str] = field(default_factory=list)
    sums: torch.Tensor | None = None
    reference_only: bool = False
    listening: bool = False
    heard: list[Heard] | None = None
    _watched: list[tuple[list[str], torch.Tensor]] = field(default_factory=list)

    def hear(self, layout: BatchLayout, found: Responses) -> None:
        """Keep the log-probs of what a loss compares with the reference, if somebody wants them."""
        if self.heard is not None and found.ref_logps_Q is not None:
            compared = layout.compared(found.logps_Q.detach(), found.ref_logps_Q, found.tokens_Q)
            self.heard.append(Heard(*compared))

    def watch(self, names: list[str], finite_P: torch.Tensor) -> None:
        """Note whether these rows' losses are finite; the host looks at the end of the pass, and waits once."""
        self._watched.append((names, finite_P))

    def name_bad_rows(self) -> None:
        """Fill `bad_rows` from what was watched."""
        if self._watched and not bool(torch.cat([finite_P for _, finite_P in self._watched]).all()):
            for names, finite_P in self._watched:
                self.bad_rows += [name for name, ok in zip(names, finite_P.tolist(), strict=True) if not ok]
        self._watched.clear()


class Passes:
    """Runs micro-batches through the model.

    Args:
        args: ms-swift's arguments: `seq_length` and `micro_batch_size`.
        models: this rank's wrapped model chunks.
        groups: process groups.
        losses: of each stream.
        references: log-probs of the reference that are known.
        reference_models: context in which the reference's model chunks are ready, as ms-swift's `null_ref_context`.
        next_batch: (iterator, virtual stage) → a micro-batch as the model takes it, as ms-swift's `get_batch`.

    Attributes:
        overheard: while it is a list, the log-probs of all passes are put there.
        baselines: by stream, z of the global batch that the passes are of (training/baselines.py).
    """

    def __init__(
        self,
        args,
        models: list,
        groups: ParallelGroups,
        losses: StreamLosses,
        references: References,
        reference_models: Callable[[], AbstractContextManager[list]],
        next_batch: Callable,
    ):
        self.args, self.models, self.groups = args, models, groups
        self.losses, self.references = losses, references
        self.uses_reference = losses.uses_reference
        self.reference_models, self.next_batch = reference_models, next_batch
        self.overheard: list[Heard] | None = None
        self.baselines: dict[str, torch.Tensor] = {}

    def run(
        self,
        chunks: list[list[dict]],
        factors: Mapping[str, float] = NOTHING,
        *,
        forward_only: bool,
        reference_only: bool = False,
        listening: bool = False,
    ) -> Pass:
        """Forward (and backward) over the micro-batches; returns the pass with this rank's sums."""
        n = len(chunks[0])
        heard = [] if listening else self.overheard
        current = Pass(
            factors, n * self.groups.dp_size, reference_only=reference_only, listening=listening, heard=heard
        )
        if not listening and self.references.attach(chunks) == n and reference_only:
            return current
        left_out = {ITEMS_KEY, REFERENCE_KEY} if listening else {ITEMS_KEY}
        iterators = [iter([{k: v for k, v in b.items() if k not in left_out} for b in batches]) for batches in chunks]
        found = get_forward_backward_func()(
            forward_step_func=partial(self.forward, current),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=n,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=forward_only,
        )
        current.sums = sum(found) if found else None  # [S, K] float64, on the last stage
        current.name_bad_rows()
        return current

    def listen(self, chunks: list[list[dict]]) -> list[Heard]:
        """Log-probs of the micro-batches as policy and reference are now, without dropout; empty off the last stage."""
        training = [model.training for model in self.models]
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                return self.run(chunks, forward_only=True, listening=True).heard
        finally:
            for model, was in zip(self.models, training, strict=True):
                model.train(was)

    def forward(self, current: Pass, data_iterator, model):
        """Reference and policy forward of one micro-batch, joined along dim 0 through the pipeline.

        Where the reference's log-probs are known, or nothing else is wanted, the one forward that is left.
        """
        unwrapped = get_attr_wrapped_model(model, "get_input_tensor", return_model_obj=True)
        input_tensor = unwrapped.get_input_tensor()
        data = self.next_batch(data_iterator, unwrapped.vp_stage)
        layout = data.pop(LAYOUT_KEY)
        known_Q = data.pop(REFERENCE_KEY, None)
        data.pop("loss_scale", None)

        if current.reference_only:
            known_Q, output = None, self.reference_forward(unwrapped.vp_stage, input_tensor, data)
        elif known_Q is not None or not self.uses_reference:
            output = model(**data)
        else:
            ref_input, input_tensor = (None, None) if input_tensor is None else input_tensor.chunk(2, dim=0)
            ref_output = self.reference_forward(unwrapped.vp_stage, ref_input, data)
            if input_tensor is not None:
                unwrapped.set_input_tensor(input_tensor)
            output = torch.cat([ref_output, model(**data)], dim=0)
        return output, partial(
            self.loss,
            current,
            labels=data.get("labels"),
            packed_seq_params=data.get("packed_seq_params"),
            layout=layout,
            known_Q=known_Q,
        )

    def reference_forward(self, vp_stage: int | None, input_tensor: torch.Tensor | None, data: dict) -> torch.Tensor:
        with torch.no_grad(), self.reference_models() as ref_models:
            ref_model = ref_models[vp_stage or 0]
            if input_tensor is not None:
                ref_model.set_input_tensor(input_tensor.detach())
            with evaluation_mode(ref_model):  # a reference with dropout is another one at every step
                return ref_model(**data)

    def loss(
        self,
        current: Pass,
        output: torch.Tensor,
        *,
        labels,
        packed_seq_params,
        layout: BatchLayout,
        known_Q: list[float] | None,
    ):
        """Weighted loss of one micro-batch, and its streams' sums as one [S, K] tensor. Last stage only.

        `known_Q` are the reference's log-probs of the sequences, where the cache holds them all.
        """
        seq_lens = None if packed_seq_params is None else own_lengths(packed_seq_params, self.groups.cp_size)
        nothing = output.new_zeros(()), output.new_zeros(len(layout.streams), WIDTH, dtype=torch.float64)
        if current.reference_only:
            self.references.keep(layout, sequence_logps(-output, labels, seq_lens, self.groups.cp)[0])
            return nothing
        joined = self.uses_reference and known_Q is None
        ref_losses, losses = output.chunk(2, dim=0) if joined else (None, output)
        reference = -ref_losses.detach() if joined else None
        tokens = TokenLogps(-losses, labels, reference, known_Q, seq_lens, self.groups.cp)
        if current.listening:
            current.hear(layout, self.losses.responses(tokens))
            return nothing
        batch = self.losses.of_batch(tokens, layout, current.factors, self.baselines)
        current.hear(layout, batch.responses)
        if joined:
            self.references.keep(layout, batch.responses.ref_logps_Q)
        for stream, finite_P in batch.finite.items():
            current.watch([f"row {row} ({stream} stream)" for row in layout.rows[stream]], finite_P)
        return (batch.loss * current.loss_scale).float(), batch.sums


def own_lengths(packed_seq_params, cp_size: int) -> torch.Tensor:
    """[Q] int64: this context-parallel rank's tokens of each sequence of a pack.

    In the zigzag partition a rank holds two of 2·CP equal parts of every sequence, one sequence behind the other.
    """
    n = packed_seq_params.seq_lens.numel()
    return (packed_seq_params.cu_seqlens_q[: n + 1] // cp_size).diff().long()


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Run `model` without dropout, and give it back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
