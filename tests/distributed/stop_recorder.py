"""A recording trainer that is asked to stop in the middle of a chosen step, on one rank or by the file."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch.distributed as dist

from tests.distributed.exact_recorder import record_exactly


def stop_exactly(base, folder: Path, in_step: int, rank: int = 0, how: str = "SIGUSR1"):
    """As `record_exactly`; while step `in_step` runs, `rank` gets the signal `how`, or makes the file `how`."""

    class Stopping(record_exactly(base, folder)):
        def train_step(self, train_data_iterator):
            if self.state.iteration + 1 == in_step and dist.get_rank() == rank:
                if how.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, how))
                else:
                    Path(how).touch()
            return super().train_step(train_data_iterator)

    return Stopping
