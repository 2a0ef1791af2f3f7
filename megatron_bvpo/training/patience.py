"""How long a held-out metric has not become better; pure, and in bvpo_state.json."""

from __future__ import annotations

import operator
from dataclasses import dataclass


@dataclass
class Patience:
    """How long a metric has not become better.

    Attributes:
        interval: how many saves it may take; None: for ever.
        greater_is_better: of the metric.
        best: the best value so far.
        waited: saves since then.
    """

    interval: int | None
    greater_is_better: bool
    best: float | None = None
    waited: int = 0

    @property
    def at_an_end(self) -> bool:
        return self.interval is not None and self.waited >= self.interval

    def look(self, best: float | None) -> None:
        """Take in the best value as of a save with an evaluation. What is as good, or no number, is not better."""
        better = operator.gt if self.greater_is_better else operator.lt
        if best is not None and (self.best is None or better(best, self.best)):
            self.best, self.waited = best, 0
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, float | int | None]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        self.best, self.waited = state["best"], state["waited"]
