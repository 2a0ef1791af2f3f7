"""z of KTO (arXiv 2402.01306), of each stream and of the global batch: a pass over mismatched responses in front of a
step's own.

It is as many micro-batches as the step has, through policy and reference, without gradients and without dropout. A row
that has no mismatched response (a filled one, a stream's only one) is left out, and where a micro-batch has none, some
sequence stands in: every rank runs the same passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bvpo.data.batches import ITEMS_KEY, LAYOUT_KEY, ROW_KEY, WEIGHT_KEY
from megatron_bvpo.data.encoded_rows import has_stream, right_key
from megatron_bvpo.data.mismatched import Place, next_responses, placed_rows, response_of, with_response
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.gradients.halves import stand_in
from megatron_bvpo.objective.unpaired import kl_baseline, kl_sums
from megatron_bvpo.streams import TABLE
from megatron_bvpo.training.passes import Passes

SIDE = "response"


class Baselines:
    """Measures z.

    Args:
        passes: run micro-batches.
        streams: those whose loss compares with z; none: there is nothing to measure.
        groups: process groups.
        collate: rows → a micro-batch.
        max_length: most tokens of a sequence; a longer mismatched one is cut.
    """

    def __init__(
        self,
        passes: Passes,
        streams: tuple[str, ...],
        groups: ParallelGroups,
        *,
        collate: Callable,
        max_length: int | None,
    ):
        self.passes, self.streams, self.groups = passes, streams, groups
        self.collate, self.max_length = collate, max_length

    def measure(self, chunks: list[list[dict]], *, dealt_in_turn: bool = True) -> None:
        """Give the passes z of this global batch. Collective.

        Args:
            chunks: this rank's micro-batches, once for each model chunk of a virtual pipeline.
            dealt_in_turn: rows go to the ranks one by one, as in training, or a whole micro-batch each, as in
                evaluation.
        """
        if not self.streams:
            return
        items = [batch[ITEMS_KEY] for batch in chunks[0]]
        placed = placed_rows(items, rank=self.groups.dp_rank, dealt_in_turn=dealt_in_turn)
        following = {stream: next_responses(found) for stream, found in self._responses(placed).items()}
        batches = [self._mismatched(rows, following) for rows in placed]
        parts = [[self.collate(rows) for rows in batches] for _ in chunks]
        heard = self.passes.listen(parts)
        if not heard:  # not on the last stage
            return
        sums = {stream: heard[0].policy_Q.new_zeros(2) for stream in self.streams}
        for batch, found in zip(parts[0], heard, strict=True):
            start = 0  # heard are the streams that a loss compares with the reference, one behind the other
            for stream in self.streams:
                weights_M = found.policy_Q.new_tensor(batch[LAYOUT_KEY].weights[stream])
                part = slice(start, start := start + len(weights_M))
                sums[stream] += kl_sums(found.policy_Q[part], found.reference_Q[part], weights_M)
        total = torch.stack(list(sums.values()))
        dist.all_reduce(total, group=self.groups.dp)
        self.passes.baselines = {stream: kl_baseline(one) for stream, one in zip(sums, total, strict=True)}

    def metrics(self) -> dict[str, tuple[Tensor, int]]:
        """Log names to (z, 1)."""
        return {f"{TABLE[stream].log_prefix}kl": (z, 1) for stream, z in self.passes.baselines.items()}

    def _responses(self, placed: list[list[tuple[Place, dict]]]) -> dict[str, dict[Place, list[int]]]:
        """Of each stream, the responses of the whole global batch that count, by their places."""
        mine = {
            stream: {
                place: response_of(_sequence(row, stream))
                for rows in placed
                for place, row in rows
                if has_stream(row, stream) and row.get(WEIGHT_KEY, 1.0)
            }
            for stream in self.streams
        }
        parts: list = [None] * self.groups.dp_size
        dist.all_gather_object(parts, mine, group=self.groups.dp)
        return {stream: {k: v for part in parts for k, v in part[stream].items()} for stream in self.streams}

    def _mismatched(self, rows: list[tuple[Place, dict]], following: dict[str, dict[Place, list[int]]]) -> list[dict]:
        """The rows of a micro-batch with other rows' responses."""
        found = []
        for place, row in rows:
            new = {ROW_KEY: row.get(ROW_KEY, -1)}
            for stream in self.streams:
                if place not in following[stream]:
                    continue
                other = with_response(_sequence(row, stream), following[stream][place], self.max_length)
                new |= {f"{_name(stream)}_{key}": value for key, value in other.items()}
                new[right_key(stream)] = True
            if len(new) > 1:
                found.append(new)
        return found or [stand_in([row for _, row in rows])]


def _name(stream: str) -> str:
    return f"{TABLE[stream].key_prefix}{SIDE}"


def _sequence(row: dict, stream: str) -> dict:
    return {key: row[f"{_name(stream)}_{key}"] for key in ("input_ids", "labels")}
