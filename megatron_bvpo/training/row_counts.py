"""What became of the rows that are encoded while training: streams, and `--lazy_tokenize`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_bvpo.data.batches import PairLayout
from megatron_bvpo.objective.streams import STREAMS


@dataclass
class RowCounts:
    """Rows of this run's steps, on one rank or over several.

    Attributes:
        used: rows that were trained.
        pairs: for each stream, its pairs among them.
        unused: rows that could not be used, by reason.
    """

    used: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, layouts: Iterable[PairLayout]) -> None:
        """Counts the micro-batches of a step."""
        for layout in layouts:
            self.used += layout.members
            self.unused.update(layout.unused)
            for stream in STREAMS:
                self.pairs[stream] += layout.pairs(stream)

    def over(self, group: dist.ProcessGroup) -> RowCounts:
        """The sum over the ranks of a group, which hold other rows each; all of them must call this."""
        found: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (self.used, self.pairs, self.unused), group=group)
        total = RowCounts()
        for used, pairs, unused in found:
            total.used += used
            total.pairs.update(pairs)
            total.unused.update(unused)
        return total

    def numbers(self) -> dict[str, int]:
        """For the log: since the start of this run."""
        return {"rows/read": self.used + self.unused.total(), "rows/unused": self.unused.total()}

    def lines(self) -> list[str]:
        """The account at the end of a run."""
        pairs = ", ".join(f"{self.pairs[stream]} {stream} pairs" for stream in STREAMS)
        lines = [f"{self.used + self.unused.total()} rows read while training, {self.used} used: {pairs}."]
        return lines + [f"  {number} × {reason}" for reason, number in self.unused.most_common()]
