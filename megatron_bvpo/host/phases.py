"""How long each part of a run takes: one line a part in the log, and a warning where a stop would not end in time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
from swift.megatron.callbacks.base import MegatronCallback
from swift.utils import get_logger

from megatron_bvpo.host import timeouts

logger = get_logger()

# Seconds between the request to stop and the end: slurm.sbatch sets it to what its --signal asks for.
WINDOW, DEFAULT_WINDOW = "BVPO_STOP_WINDOW_S", 600.0
# What a stop may take of them: file systems have bad days.
SHARE = 0.6


def tell(name: str, seconds: float) -> None:
    logger.info(f"time: {name}: {seconds:.1f} s")


@contextmanager
def timed(name: str, owner: object | None = None, method: str = "") -> Iterator[None]:
    """Log the seconds of a block: rank 0's, the time in which it waits for other ranks included.

    Args:
        owner, method: a method that is called in the block; each of its calls gets a line of its own, too.
    """
    start = time.monotonic()
    if owner is not None:
        stock = getattr(owner, method)

        def call(*args, **kwargs):
            with timed(f"{name.partition(':')[0]}: {method}"):
                return stock(*args, **kwargs)

        setattr(owner, method, call)
    try:
        yield
    finally:
        if owner is not None:
            delattr(owner, method)
    tell(name, time.monotonic() - start)


def since_start() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def stop_warning(step: float, save: float, env: Mapping[str, str] | None = None) -> str | None:
    """Why a stop may not end in time, or None.

    Args:
        step, save: seconds of the longest step and of the last save.
    """
    try:
        window = float((os.environ if env is None else env).get(WINDOW) or DEFAULT_WINDOW)
    except ValueError:
        window = DEFAULT_WINDOW
    if step + save <= SHARE * window:
        return None
    return (
        f"A stop on request takes up to {step + save:.0f} s (a step {step:.0f} s, a save {save:.0f} s), more than "
        f"{SHARE:.0%} of the {window:.0f} s between the request and the end. Ask earlier (sbatch "
        f"--signal=B:USR1@SECONDS with {WINDOW}=SECONDS), or make steps or saves shorter (global_batch_size, "
        "merge_lora false or save_safetensors false)."
    )


class StepTimes(MegatronCallback):
    """The first step's seconds and the longest of the others; from the first step on, `--ddp_timeout` holds.

    Attributes:
        longest: seconds of the longest step since the first, which compiles and connects; 0 before there is one.
    """

    def __init__(self, trainer):
        super().__init__(trainer)
        self.longest = 0.0
        self.told = 0.0
        self._first = True
        self._began = 0.0

    def on_step_begin(self):
        self._began = time.monotonic()

    def on_step_end(self):
        seconds = time.monotonic() - self._began
        if not self._first:
            self.longest = max(self.longest, seconds)
            return
        self._first = False
        tell("first step", seconds)
        tell("from the start of this process to the end of the first step", since_start())
        timeouts.shorten(self.args.ddp_timeout)

    def after_save(self, seconds: float) -> None:
        """Warn where step and save do not leave enough of the window; again only if it has become a fifth worse."""
        warning = stop_warning(self.longest, seconds)
        if warning and self.longest + seconds > 1.2 * self.told:
            self.told = self.longest + seconds
            logger.warning(warning)
