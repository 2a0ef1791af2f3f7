"""A stream of rows, encoded as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.utils.data
from swift.template import MaxLengthError
from swift.utils import get_logger

from megatron_bvpo.data.batches import UNUSED_KEY
from megatron_bvpo.data.handover import SOURCE_KEY

logger = get_logger()
_MAX_TOLD = 10


class EncodedStream(torch.utils.data.IterableDataset):
    """The rows of a stream that can be encoded; what cannot be used travels with them as a count by reason.

    One row is held back, so that the last one carries what was lost after it.
    """

    def __init__(self, rows, template, strict: bool = False):
        self.rows, self.template, self.strict = rows, template, strict
        self.told = 0

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        held = None
        for row in self.rows:
            try:
                encoded = self.template.encode(row, return_length=True)
            except MaxLengthError:  # counted and told by the template
                continue
            except Exception as error:  # whatever a template raises for a row, the row is lost
                if self.strict:
                    raise
                self._tell(row, error)
                continue
            if held is not None:
                yield held
            held = encoded
        if held is not None:
            held[UNUSED_KEY] = dict(Counter(held[UNUSED_KEY]) + self.template.unused)
            self.template.unused.clear()
            yield held

    def _tell(self, row: dict[str, Any], error: Exception) -> None:
        self.told += 1
        if self.told <= _MAX_TOLD:
            said = " ".join(str(error).split())[:200]
            logger.warning(f"{row.get(SOURCE_KEY)}: cannot be encoded: {type(error).__name__}: {said}")
