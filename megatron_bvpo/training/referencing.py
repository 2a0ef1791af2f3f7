"""Reference log-probs paid once: known pairs go through the policy alone.

Before a pass all ranks agree, for each micro-batch, whether **every** pair of it is known on **every** rank.
Ranks of one pipeline, tensor or context group must run the same forwards, and the ranks of an expert group meet
in the all-to-all of the same micro-batch, so a rank that ran a reference forward alone would wait for ever.
One all-reduce over all ranks of one number a micro-batch decides for all of these groups.

Every rank holds the same table. New values stay with the last stage until a flush, a fixed number of steps
apart, when they are gathered, added to every table and written by one rank.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from swift.utils import get_current_device, get_logger, is_master
from torch import Tensor

from megatron_bvpo.data.batches import LAYOUT_KEY, BatchLayout
from megatron_bvpo.data.reference_cache import ReferenceShards, Values
from megatron_bvpo.errors import UserError
from megatron_bvpo.gradients.groups import ParallelGroups
from megatron_bvpo.host.reference_key import reference_key
from megatron_bvpo.streams import TABLE
from megatron_bvpo.training.canaries import Heard

logger = get_logger()

REFERENCE_KEY = "bvpo_reference"
# A killed run loses the values of as many steps. A shard holds them: more often would make many small files.
FLUSH_STEPS = 32


class References:
    """The log-probs of the reference that are known; without `--bvpo_ref_cache` none ever is.

    Args:
        args: ms-swift's arguments: what the reference is.
        folder: `--bvpo_ref_cache`, or None.
        groups: process groups.

    Attributes:
        table: pairs to log-probs, the same on all ranks; None without a cache.
        shards: the files, on rank 0.
        hits: micro-batches of the step that is run: known, all.
    """

    def __init__(self, args, folder: str | None, groups: ParallelGroups):
        self.table: dict[bytes, Values] | None = None
        self.shards: ReferenceShards | None = None
        self.hits = (0, 0)
        self._new: list[tuple[BatchLayout, Tensor]] = []  # with sequence log-probs [Q]
        self._unflushed = 0  # micro-batches computed since the last flush, the same on all ranks
        self._keeps = not (groups.tp_rank or groups.cp_rank)
        if folder is not None:
            self._open(args, folder)

    def _open(self, args, folder: str) -> None:
        key, description = reference_key(args)
        path = Path(folder) / key
        found = [None, None]
        if is_master():
            try:
                self.shards = ReferenceShards(path, description)
                found[0] = self.shards.read()
            except OSError as e:
                found[1] = f"{e.strerror or e}"
        # From one rank, so that no rank's view of a shared file system differs from another's.
        dist.broadcast_object_list(found, src=0)
        table, problem = found
        if problem is not None:
            raise UserError(
                f"the folder of reference log-probs cannot be used: {problem}",
                file=str(path),
                field="--bvpo_ref_cache",
                remedy="name a folder on a disk that rank 0 can write",
            )
        self.table = table
        logger.info(f"Reference log-probs in {path}: {len(table)} pairs are known.")

    # ---- in a pass

    def begin_step(self) -> None:
        """The hits are counted from here on."""
        self.hits = (0, 0)

    def attach(self, chunks: list[list[dict]]) -> int:
        """Put the known values on the micro-batches that need no reference forward; returns how many those are."""
        if self.table is None:
            return 0
        known = [all(key in self.table for key in batch[LAYOUT_KEY].all_keys()) for batch in chunks[0]]
        agreed = torch.tensor(known, dtype=torch.int32, device=get_current_device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        for i, hit in enumerate(agreed.tolist()):
            for batches in chunks:
                batches[i][REFERENCE_KEY] = self._values_of(batches[i][LAYOUT_KEY]) if hit else None
        hits = int(agreed.sum())
        self._unflushed += len(known) - hits
        self.hits = (self.hits[0] + hits, self.hits[1] + len(known))
        return hits

    def _values_of(self, layout: BatchLayout) -> list[float]:
        """Reference log-probs of a micro-batch's sequences, in its own order; 0 for those that no loss asks of it."""
        values: list[float] = []
        for stream in layout.streams:
            if stream in layout.keys:
                pairs = [self.table[key] for key in layout.keys[stream]]
                values += [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
            else:
                values += [0.0] * (layout.count(stream) * len(TABLE[stream].sides))
        return values

    def beside_new(self, batches: list[dict], heard: list[Heard]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(cached, new) reference log-probs and token counts of those micro-batches that are known on this rank."""
        layouts = [batch[LAYOUT_KEY] for batch in batches[: len(heard)]]
        found = []
        for layout, new in zip(layouts, heard, strict=True):
            if self.table is not None and all(key in self.table for key in layout.all_keys()):
                (known_Q,) = layout.compared(new.reference_Q.new_tensor(self._values_of(layout)))
                found.append((known_Q, new.reference_Q, new.tokens_Q))
        return found

    def keep(self, layout: BatchLayout, ref_logps_Q: Tensor) -> None:
        """Remember computed values; on the device, because a copy to the host would wait for the forward."""
        if self.table is not None and self._keeps:
            self._new.append((layout, ref_logps_Q.detach().clone()))

    # ---- between passes

    def flush(self) -> None:
        """Share and write the new values. Collective; every rank calls it at the same steps."""
        if self.table is None or not self._unflushed:
            return
        self._unflushed = 0
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._computed())
        fresh: dict[bytes, Values] = {}
        for part in parts:
            for key, values in part.items():
                if key not in self.table:
                    fresh.setdefault(key, values)
        self.table.update(fresh)
        if fresh and is_master():
            try:
                self.shards.write(fresh)
            except OSError as e:  # a full disk costs the cache, not the run
                logger.warning(f"Reference log-probs of {len(fresh)} pairs are not written: {e}")

    def _computed(self) -> dict[bytes, Values]:
        """This rank's new values, those that are finite."""
        new: dict[bytes, Values] = {}
        lost: list[int] = []
        for layout, logps_Q in self._new:
            for stream, keys in layout.keys.items():
                chosen, rejected = layout.slices(stream)
                values = zip(logps_Q[chosen].tolist(), logps_Q[rejected].tolist(), strict=True)
                for key, row, pair in zip(keys, layout.rows[stream], values, strict=True):
                    if all(math.isfinite(v) for v in pair):
                        new.setdefault(key, pair)
                    else:
                        lost.append(row)
        if lost:
            logger.warning(f"The reference's log-probs are not finite for rows {sorted(set(lost))}; not kept.")
        self._new = []
        return new

    def flush_now_and_then(self, step: int) -> bool:
        """Flush behind every `FLUSH_STEPS`-th of the steps, which are counted from 1; whether this was one."""
        due = step % FLUSH_STEPS == 0
        if due:
            self.flush()
        return due
