"""`bvpo refs`: the reference alone over every row, so that later runs have its log-probs."""

from __future__ import annotations

from collections.abc import Callable

from swift.utils import get_logger

from megatron_bvpo.training.passes import Passes
from megatron_bvpo.training.referencing import References

logger = get_logger()


def fill_references(
    name: str, iterators: list, steps: int, take_batch: Callable, passes: Passes, references: References
) -> None:
    """Run the reference over the rows of one data set, and write what it says.

    Args:
        name: of the data, for the log.
        iterators: over its micro-batches, one for each model chunk.
        steps: how many global batches there are.
        take_batch: iterators → the micro-batches of a global batch.
    """
    for step in range(steps):
        passes.run(take_batch(iterators), forward_only=True, reference_only=True)
        if references.flush_now_and_then(step + 1):
            logger.info(f"Reference log-probs of the {name} data: {step + 1} of {steps} global batches.")
    references.flush()
