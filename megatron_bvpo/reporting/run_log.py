"""The log of a run: ms-swift's `logging.jsonl`, a JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.streams import TABLE

LOG = "logging.jsonl"
# Name and prefix in the log of the streams of pairs.
STREAMS = tuple((stream.name, stream.log_prefix) for stream in TABLE.values() if stream.estimates)


def measured_streams(line: dict, prefix: str = "") -> tuple[str, ...]:
    """Those that a line of the log tells of, demonstrations too; `prefix`: `eval_` for evaluations."""
    return tuple(name for name in TABLE if f"{prefix}loss/{name}" in line)


def read_log(run: Path) -> tuple[list[dict], list[dict]]:
    """Training and evaluation lines of a run, each with its step number under `step`.

    A run that goes on is writing its last line, and one that was resumed has steps twice: both are left as they are.
    """
    training, evaluation = [], []
    for text in (run / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"] = int(line["iteration"].split("/")[0])
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # half a line, or ms-swift's last one, which names the best checkpoint
        (evaluation if "eval_loss" in line else training).append(line)
    return training, evaluation


def require_log(run: Path) -> Path:
    """`run` if it holds a log.

    Raises:
        UserError: it does not; names the folders below it that do (ms-swift's `v0-20261127-104500`).
    """
    if (run / LOG).is_file():
        return run
    remedy = "name the run's --output_dir"
    if run.is_dir():
        below = sorted(log.parent for log in (*run.glob(f"*/{LOG}"), *run.glob(f"*/*/{LOG}")))
        if below:
            remedy = f"did you mean {' '.join(map(str, below[:3]))}{' …' if len(below) > 3 else ''}?"
    raise UserError("there is no logging.jsonl", file=str(run), remedy=remedy)
