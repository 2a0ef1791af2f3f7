"""Stop a run so that nothing is lost: finish the step, save, end in order.

A rank is asked to stop by SIGUSR1 or SIGTERM, or by a file: `BVPO_STOP_FILE` names a path that `bvpo supervise`
or a batch script creates. The file is the safer way, because a signal to a job step also reaches ms-swift's
launcher and torchrun, which would end the ranks instead of letting them save.

The ranks never decide alone: at the end of each step they reduce one flag over the whole job, so that they all
save the same step. Then the run ends as a finished run does, with exit code 0, and leaves a note beside the file,
`<file>.done`, which says that it was stopped and where to go on.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from swift.megatron.callbacks.base import MegatronCallback
from swift.utils import get_current_device, get_logger

logger = get_logger()

STOP_FILE = "BVPO_STOP_FILE"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def done_note(stop_file: str | os.PathLike) -> Path:
    """Where a run that was stopped says so."""
    return Path(f"{stop_file}.done")


class StopRequest:
    """Whether this rank was asked to stop."""

    def __init__(self, stop_file: str | None):
        self.reason: str | None = None
        self._file = stop_file or None
        self._previous: dict[int, object] = {}

    def listen(self) -> None:
        """Take the signals over, once. Only for the training loop: before it there is nothing to save."""
        if not self._previous:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)

    def unlisten(self) -> None:
        """Give the signals back to who had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _on_signal(self, number: int, frame) -> None:
        self.reason = signal.Signals(number).name
        # Who asks a second time does not want to wait for the save.
        signal.signal(number, signal.SIG_DFL)

    def pending(self) -> bool:
        """Asked by now, on this rank."""
        if self.reason is None and self._file is not None and os.path.exists(self._file):
            self.reason = f"the file {self._file}"
        return self.reason is not None


class StopCallback(MegatronCallback):
    """Turns a request on any rank into a save and an orderly end on all. Comes after ms-swift's own callbacks."""

    def __init__(self, trainer):
        super().__init__(trainer)
        # One rank of each node looks at the shared file system; a signal may reach any rank.
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        self.request = StopRequest(os.environ.get(STOP_FILE) if is_first else None)
        self.stopping = False

    def on_step_begin(self):
        self.request.listen()

    def on_step_end(self):
        state = self.state
        if state.iteration >= self.args.train_iters:
            return  # the last step is saved anyway
        self.stopping = self.trainer.groups.any_rank(self.request.pending(), get_current_device())
        if self.stopping:
            logger.info(f"Asked to stop ({self.request.reason or 'on another rank'}): saving after this step.")
            state.should_save = state.should_log = True
            state.should_eval = False  # it would run before the save, and the time is short

    def on_save(self, output_dir):
        if not self.stopping:
            return
        args, state = self.args, self.state
        total, args.train_iters = args.train_iters, state.iteration  # as ms-swift ends a run that is out of data
        logger.info(f"Stopped on request after step {state.iteration} of {total}; go on from {output_dir}.")
        self._leave_note(str(output_dir), total)

    def _leave_note(self, checkpoint: str, total: int) -> None:
        stop_file = os.environ.get(STOP_FILE)
        if stop_file is None or int(os.environ.get("RANK", "0")) != 0:
            return
        note = {"iteration": self.state.iteration, "train_iters": total, "checkpoint": checkpoint}
        partial = done_note(stop_file).with_suffix(".partial")
        partial.write_text(json.dumps(note), encoding="utf-8")
        os.replace(partial, done_note(stop_file))

    def on_train_end(self):
        self.request.unlisten()
