"""The process of one job: measures its figures one after the other and appends each as a line.

    python -m benchmarks.gpu.worker SPEC.json

A figure that raises is a line too ("failed"), and the next one follows, unless the device is lost: after an illegal
access every call fails, so the process ends and the driver starts another one behind the figure at fault.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.lines import Lines
from benchmarks.gpu.machine import card_state

TIME_IS_UP = 75  # exit code: what is left does not fit; nothing failed
DEVICE_LOST = 76


def die_with_the_driver() -> None:
    """Linux: a driver that is killed leaves no worker behind to write beside the next one's."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


def main(spec_file: str) -> None:
    die_with_the_driver()
    spec = json.loads(Path(spec_file).read_text())
    lines = Lines(spec["lines"])
    missing = None  # why the provider is not there: the same for all its figures
    for figure in spec["figures"]:
        if missing:
            lines.append({"key": figure["key"], **spec["about"], "failed": missing})
            continue
        if time.monotonic() + figure["seconds"] > spec["until"]:
            sys.exit(TIME_IS_UP)
        print(f"----- {figure['key']}", flush=True)
        start = time.monotonic()
        try:
            found = function(figure["call"])(**figure["args"])
            broken = False
        except Exception as error:  # a failure is a result, and the others are still to be had
            traceback.print_exc()
            found, broken = {"failed": told(error)}, "CUDA error" in str(error)
            if type(error).__name__ == "Unavailable":
                missing = told(error)
        took = round(time.monotonic() - start, 2)
        lines.append({"key": figure["key"], **spec["about"], "seconds": took, **found, **clocks()})
        if broken:
            sys.exit(DEVICE_LOST)


def function(name: str):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def clocks() -> dict:
    """What the card says of itself right after a figure; nothing without one."""
    torch = sys.modules.get("torch")
    return {"card": card_state()} if torch is not None and torch.cuda.is_available() else {}


if __name__ == "__main__":
    main(sys.argv[1])
