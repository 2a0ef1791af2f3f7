"""A trainer class whose probes go wrong in chosen ways, for tests that alpha then holds."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_bvpo.data.batches import ITEMS_KEY
from megatron_bvpo.gradients import shards
from tests.distributed.hooks import around
from tests.distributed.recorders import record_first_step


def faulty_probes(base, folder, fault: str, step: int = 2, rank: int = 1):
    """In the probe of `step` (equal streams: in every one), …

    Args:
        fault: `equal streams`: the empty stream gets the trace stream's tokens; `NaN in pass N`: one element of the
            gradient after the N-th pass is a NaN, on `rank` only; `raise in pass N`: that rank raises there.
    """

    class Faulty(record_first_step(base, folder, gradients=False)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            around(self.probes, "plan", self._plan)
            around(self.passes, "run", self._run)

        def _plan(self, stock, batches, iteration):
            if fault == "equal streams":
                for batch in batches:
                    for row in batch[ITEMS_KEY]:
                        make_streams_equal(row)
            probe = stock(batches, iteration)
            self.pass_of_probe = 0
            return probe

        def _run(self, stock, *args, forward_only, **more):
            done = stock(*args, forward_only=forward_only, **more)
            self.pass_of_probe = getattr(self, "pass_of_probe", 0) + 1
            here = self.state.iteration + 1 == step and dist.get_rank() == rank and not forward_only
            if here and fault == f"NaN in pass {self.pass_of_probe}":
                own = shards.gradient_slices(self.wrapped_models, tp_rank=self.groups.tp_rank)
                own[0].grad_E[3] = math.nan  # what other ranks own is thrown away
            if here and fault == f"raise in pass {self.pass_of_probe}":
                raise RuntimeError("this rank is meant to fail")
            return done

    return Faulty


def make_streams_equal(row: dict) -> None:
    for key in [key for key in row if key.startswith(("chosen_", "rejected_"))]:
        row[f"empty_{key}"] = row[key]
