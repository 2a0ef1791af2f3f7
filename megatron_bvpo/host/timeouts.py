"""How long a collective may take: hours until the first step, `--ddp_timeout` from then on.

Before the first step ranks wait for what one of them does alone: tokenising, reading the model, compiling. From then on
a collective that does not end is a hang, and is to end the job and not the allocation.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

# Seconds until the first step. A lost node is noticed by its supervisor long before (cluster/roll_call.py).
START_S = 4 * 3600


@contextmanager
def patient_until_the_first_step(args):
    """ms-swift makes its process groups in this block; they get START_S, or `--ddp_timeout` where that is longer."""
    asked, args.ddp_timeout = args.ddp_timeout, max(args.ddp_timeout, START_S)
    try:
        yield
    finally:
        args.ddp_timeout = asked


def groups_of_this_rank() -> list[dist.ProcessGroup]:
    """Every process group that this rank is in, whoever made it."""
    return [group for group in list(c10d._world.pg_map) if group != c10d.GroupMember.NON_GROUP_MEMBER]


def shorten(seconds: int) -> None:
    """Collectives that begin from now on may take so many seconds, on all of this rank's groups."""
    for group in groups_of_this_rank():
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def current(group: dist.ProcessGroup | None = None) -> timedelta:
    """The timeout of a group; of the whole job's where none is given."""
    group = c10d._get_default_group() if group is None else group
    return max(group._get_backend(device).options._timeout for device in group._device_types)
