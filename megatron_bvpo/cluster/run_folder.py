"""Where a run keeps its checkpoints and logs, and how it goes on from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import argv, path_rules
from megatron_bvpo.launching.run_file import RunFile

LAST = "last-checkpoint"
STATE_FILE = "bvpo_state.json"  # of host/checkpoint.py, which needs torch to be imported


def run_folder(run: RunFile) -> Path:
    """BVPO_RUN_DIR, else the run's --output_dir, else runs/<name of the YAML file>; absolute."""
    given = os.environ.get("BVPO_RUN_DIR") or run.value("output_dir") or str(Path("runs", run.title))
    return Path(os.path.abspath(os.path.expanduser(given)))


def refuse_unresumable(run: RunFile, env: Mapping[str, str] | None = None) -> None:
    """Raise UserError for a run whose checkpoints nothing could go on from.

    Under `BVPO_RESUME=never` they may be so, but not under Slurm: there `never` speaks of the job's first start.
    """
    env = os.environ if env is None else env
    restarts = env.get("BVPO_RESUME", "auto") != "never" or (env.get("BVPO_ATTEMPT") or "").startswith("slurm-")
    if restarts and argv.is_true(list(run.flags), "no_save_optim"):
        raise UserError(
            "is true, and a run without its optimizer's state cannot go on after a restart",
            file=run.file,
            field="no_save_optim",
            remedy="leave it out"
            + (", or begin anew each time with BVPO_RESUME=never" if not env.get("SLURM_JOB_ID") else ""),
        )


def resume_flags(run: RunFile, folder: Path) -> list[str]:
    """Flags that go on from `last-checkpoint`; none where there is none yet.

    They come last on the command line and so win over where the run says that it begins (a warm start from an
    `mcore_adapter` or `mcore_model`): that holds until the run has a checkpoint of its own.
    """
    checkpoint = folder / LAST
    if not os.path.lexists(checkpoint):
        return []
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        full = state["tuner"]["tuner_type"] == "full"
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"cannot be read ({e})",
            file=str(checkpoint / STATE_FILE),
            remedy=f"point {checkpoint} at a whole checkpoint, or remove it to begin anew",
        ) from None
    if path_rules.saved_without_optimizer(checkpoint):
        raise UserError(
            "was saved with no_save_optim, so the run cannot go on from it",
            file=str(checkpoint.resolve()),
            remedy="begin anew with BVPO_RESUME=never; as a start its weights are good (--adapters, or --model)",
        )
    # The folder itself and not the link: it is moved while the run goes on.
    return ["--finetune", "false", "--mcore_model" if full else "--mcore_adapter", str(checkpoint.resolve())]


def reached(folder: Path) -> int:
    """The step of `last-checkpoint`, 0 where there is none."""
    try:
        return int(json.loads((folder / LAST / STATE_FILE).read_text(encoding="utf-8"))["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
