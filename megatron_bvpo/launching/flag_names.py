"""The names of the flags, known without loading ms-swift, and what a wrong one was probably meant to be.

flag_names.json has the fields of `BvpoArguments` and of the ms-swift 4.6 classes under it;
tests/unit/test_plan_settings.py compares it with their source.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

# Flags of ms-swift's other backend that people bring along, and what the Megatron backend calls them.
MEGATRON_NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "learning_rate": "lr",
    "max_steps": "train_iters",
    "lr_scheduler_type": "lr_decay_style",
    "warmup_ratio": "lr_warmup_fraction",
    "deepspeed": "use_distributed_optimizer",
}
# Keys of a YAML file that are no fields: environment variables, and the switch to this backend.
OTHER_KEYS = ("ENV", "megatron")


def flag_names() -> list[str]:
    """Names of all flags, sorted."""
    return json.loads((Path(__file__).parent / "flag_names.json").read_text())


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """A line for each key that is no flag's name, with the one that was probably meant."""
    names = flag_names()
    known = {*names, *OTHER_KEYS}
    found = []
    for key in keys:
        if key in known:
            continue
        close = difflib.get_close_matches(key, [*names, *MEGATRON_NAMES], n=1, cutoff=0.7)
        hint = f"; did you mean {MEGATRON_NAMES.get(close[0], close[0])}?" if close else ""
        found.append(f"{key}: no such key, so it changes nothing here and the run refuses it{hint}")
    return found
