"""How much of a step is demonstrations: CHORD's schedule (arXiv 2508.11408). Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MuSchedule:
    """µ over the steps of a run, in L = (1 − µ)·L_preference + µ·L_demonstrations.

    It rises linearly from 0 to the peak in `warmup_steps` optimizer steps, falls to the valley along half a cosine in
    `decay_steps` more, and stays there. Without warm-up and decay it is the valley throughout.

    Raises ValueError for shares outside of [0, 1] and for steps below 0.
    """

    peak: float
    valley: float
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self):
        for name in ("peak", "valley"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mu_{name} is {getattr(self, name)}; it must be in [0, 1]")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"mu_{name} is {getattr(self, name)}; it must be 0 or more")

    def at(self, step: int) -> float:
        """µ of a step, counted from 0: the number of steps that were taken before it."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        since = step - self.warmup_steps
        if since >= self.decay_steps:
            return self.valley
        return self.valley + (self.peak - self.valley) * 0.5 * (1 + math.cos(math.pi * since / self.decay_steps))
