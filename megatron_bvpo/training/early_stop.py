"""`early_stop_interval` of ms-swift, for its Megatron backend: a run ends whose held-out metric does not get better.

As in ms-swift's other backend, saves count: the run ends behind the save that is the n-th in a row without a better
`metric_for_best_model` than all before it. A save without an evaluation (a stop on request) counts for nothing. The
count is in the checkpoint that it belongs to, so that a resumed run ends where an uninterrupted one does; and the best
checkpoint stays whatever --save_total_limit says (ms-swift's rotation).
"""

from __future__ import annotations

from swift.megatron.callbacks.base import MegatronCallback
from swift.utils import get_logger

from megatron_bvpo.training.patience import Patience

logger = get_logger()


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
