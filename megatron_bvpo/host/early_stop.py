"""`early_stop_interval` of ms-swift, for its Megatron backend: a run ends whose held-out metric does not get better.

As in ms-swift's other backend, saves count: the run ends behind the save that is the n-th in a row without a better
`metric_for_best_model` than all before it. A save without an evaluation (a stop on request) counts for nothing. The
count is in the checkpoint that it belongs to, so that a resumed run ends where an uninterrupted one does; and the best
checkpoint stays whatever --save_total_limit says (ms-swift's rotation).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from swift.megatron.callbacks.base import MegatronCallback
from swift.utils import get_logger

logger = get_logger()


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


class EarlyStopCallback(MegatronCallback):
    """Ends the run behind a save, as ms-swift ends one that is out of data. All ranks know the same metric."""

    def __init__(self, trainer, patience: Patience):
        super().__init__(trainer)
        self.patience = patience

    def on_train_begin(self):
        self._end()  # the checkpoint that the run goes on from was its last

    def on_save(self, output_dir):
        self._end()

    def _end(self):
        args, state = self.args, self.state
        if not self.patience.at_an_end or state.iteration >= args.train_iters:
            return
        metric = args.metric_for_best_model
        logger.info(
            f"Early stop after step {state.iteration} of {args.train_iters}: {metric} was no better "
            f"than {self.patience.best} at the last {self.patience.waited} saves. Best: {state.best_model_checkpoint}."
        )
        args.train_iters = state.iteration
