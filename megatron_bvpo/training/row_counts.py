"""What became of the rows that are encoded while training: streams, and `--lazy_tokenize`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_bvpo.data.batches import WHOLE_ROW, PairLayout
from megatron_bvpo.objective.streams import STREAMS


@dataclass
class RowCounts:
    """Rows of this run's steps, on one rank or over several.

    Attributes:
        used: rows that were trained.
        pairs: for each stream, its pairs among them.
        unused: rows that could not be used, by reason.
        lost: pairs that were lost of rows that were used, by stream and reason.
    """

    used: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, layouts: Iterable[PairLayout]) -> None:
        """Counts the micro-batches of a step."""
        for layout in layouts:
            self.used += layout.members
            for (what, reason), number in layout.unused.items():
                if what == WHOLE_ROW:
                    self.unused[reason] += number
                else:
                    self.lost[what, reason] += number
            for stream in STREAMS:
                self.pairs[stream] += layout.pairs(stream)

    def over(self, group: dist.ProcessGroup) -> RowCounts:
        """The sum over the ranks of a group, which hold other rows each; all of them must call this."""
        found: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (self.used, self.pairs, self.unused, self.lost), group=group)
        total = RowCounts()
        for used, pairs, unused, lost in found:
            total.used += used
            total.pairs.update(pairs)
            total.unused.update(unused)
            total.lost.update(lost)
        return total

    def numbers(self) -> dict[str, int]:
        """For the log: since the start of this run."""
        return {"rows/read": self.used + self.unused.total(), "rows/unused": self.unused.total()}

    def lines(self) -> list[str]:
        """The account at the end of a run."""
        pairs = ", ".join(f"{self.pairs[stream]} {stream} pairs" for stream in STREAMS)
        lines = [f"{self.used + self.unused.total()} rows read while training, {self.used} used: {pairs}."]
        lines += [f"  {number} rows not used: {reason}" for reason, number in self.unused.most_common()]
        return lines + [f"  {number} {stream} pairs lost: {why}" for (stream, why), number in self.lost.most_common()]
