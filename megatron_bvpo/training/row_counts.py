"""What became of the rows that are encoded while training: streams, and `--lazy_tokenize`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_bvpo.data.batches import WHOLE_ROW, BatchLayout
from megatron_bvpo.streams import TABLE


@dataclass
class RowCounts:
    """Rows of this run's steps, on one rank or over several.

    Attributes:
        streams: of the run.
        used: rows that were trained.
        counts: for each stream, its members among them.
        unused: rows that could not be used, by reason.
        lost: members that were lost of rows that were used, by stream and reason.
    """

    streams: tuple[str, ...]

    used: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, layouts: Iterable[BatchLayout]) -> None:
        """Counts the micro-batches of a step."""
        for layout in layouts:
            self.used += layout.members
            for (what, reason), number in layout.unused.items():
                if what == WHOLE_ROW:
                    self.unused[reason] += number
                else:
                    self.lost[what, reason] += number
            for stream in layout.streams:
                self.counts[stream] += layout.count(stream)

    def over(self, group: dist.ProcessGroup) -> RowCounts:
        """The sum over the ranks of a group, which hold other rows each; all of them must call this."""
        found: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (self.used, self.counts, self.unused, self.lost), group=group)
        total = RowCounts(self.streams)
        for used, counts, unused, lost in found:
            total.used += used
            total.counts.update(counts)
            total.unused.update(unused)
            total.lost.update(lost)
        return total

    def numbers(self) -> dict[str, int]:
        """For the log: since the start of this run."""
        return {"rows/read": self.used + self.unused.total(), "rows/unused": self.unused.total()}

    def lines(self) -> list[str]:
        """The account at the end of a run."""
        found = ", ".join(f"{self.counts[s]} {s} {TABLE[s].members}" for s in self.streams)
        lines = [f"{self.used + self.unused.total()} rows read while training, {self.used} used: {found}."]
        lines += [f"  {number} rows not used: {reason}" for reason, number in self.unused.most_common()]
        lost = self.lost.most_common()
        return lines + [f"  {number} {s} {TABLE[s].members} lost: {reason}" for (s, reason), number in lost]
