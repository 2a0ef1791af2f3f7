"""Files and folders that a run names: they must be there, and be what they are named as, before it starts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError, or_bound

# Checkpoints in Megatron's form.
MEGATRON_FOLDERS = ("mcore_model", "mcore_adapter", "mcore_ref_model", "mcore_ref_adapter")
PLUGINS = ("external_plugins", "custom_register_path", "custom_dataset_info")
CACHED = ("cached_dataset", "cached_val_dataset")
DATA = ("dataset", "val_dataset")
# Made where they are not there yet.
OUTPUTS = ("tensorboard_dir", "bvpo_ref_cache")
_LOCAL = ("/", "./", "../", "~")
_COUNT = re.compile(r"(.*)#(-?\d+)")


def check_paths(args: Any) -> None:
    """Raise UserError for the first path that a run with these arguments could not use."""
    for flag in MEGATRON_FOLDERS:
        if getattr(args, flag):
            check_megatron_folder(getattr(args, flag), flag)
    for flag in ("adapters", "ref_adapters"):
        for path in _several(getattr(args, flag)):
            _check_adapter(path, flag)
    for flag in PLUGINS:
        for path in _several(getattr(args, flag)):
            _require(os.path.isfile(os.path.expanduser(path)), "no such file", path, flag)
    for flag in CACHED:
        for spec in _several(getattr(args, flag)):
            path = spec if os.path.exists(spec) else _COUNT.sub(r"\1", spec)
            _require(os.path.isdir(path), "no such folder", path, flag)
            saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
            _require(saved, "the folder holds no data set of `swift export --to_cached_dataset`", path, flag)
    for flag in DATA:
        check_data(_several(getattr(args, flag)), flag)
    for flag in OUTPUTS:
        if getattr(args, flag):
            _make_folder(getattr(args, flag), flag)


def check_data(specs: list[str], flag: str) -> None:
    """Raise UserError for an empty folder, and for `name#0`, of which nothing is left."""
    for spec in specs:
        counted = None if os.path.exists(spec) else _COUNT.fullmatch(spec)
        name = counted[1] if counted else spec
        if counted and int(counted[2]) < 1:
            raise UserError(
                f"takes {counted[2]} rows of {name}", field=f"--{flag}", remedy="write name#100 for 100 rows"
            )
        if os.path.isdir(name):
            _require(any(files for _, _, files in os.walk(name)), "the folder is empty", name, flag)


def _several(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _require(ok: bool, problem: str, path: str, flag: str, remedy: str | None = None) -> None:
    if not ok:
        remedy = remedy or f"check the path, and that it is mounted here{or_bound()}"
        raise UserError(problem, file=path, field=f"--{flag}", remedy=remedy)


def _check_adapter(path: str, flag: str) -> None:
    # ms-swift fetches --adapters from a hub, but not --ref_adapters.
    hub = flag == "adapters" and path.count("/") == 1 and not path.startswith(_LOCAL)
    if hub and not os.path.exists(path):
        return
    _require(os.path.isdir(os.path.expanduser(path)), "no such folder", path, flag)
    _require(
        os.path.isfile(os.path.join(os.path.expanduser(path), "adapter_config.json")),
        "the folder holds no adapter_config.json",
        path,
        flag,
        "name a folder with a PEFT adapter, or give a checkpoint of Megatron's form as --mcore_"
        + ("adapter" if flag == "adapters" else "ref_adapter"),
    )


def check_megatron_folder(path: str, flag: str) -> None:
    """A folder with `latest_checkpointed_iteration.txt` and, in that iteration's folder, Megatron's weights."""
    _require(os.path.isdir(path), "no such folder", path, flag)
    tracker = Path(path, "latest_checkpointed_iteration.txt")
    try:
        folder = Path(path, f"iter_{int(tracker.read_text()):07d}")
    except (OSError, ValueError):
        folder = None
    _require(
        folder is not None and folder.is_dir(),
        "the folder holds no checkpoint of Megatron's form",
        path,
        flag,
        "name a checkpoint-N folder of a run",
    )
    if not (folder / "metadata.json").is_file():
        instead = "adapters" if "adapter" in flag else "model"
        raise UserError(
            "the checkpoint holds no weights in Megatron's form: it was saved with no_save_optim",
            file=path,
            field=f"--{flag}",
            remedy=f"begin from its safetensors: --{'ref_' if 'ref' in flag else ''}{instead} {path}",
        )


def saved_without_optimizer(checkpoint: Path) -> bool:
    """Whether the run that wrote a checkpoint had no_save_optim."""
    try:
        return bool(json.loads((checkpoint / "args.json").read_text(encoding="utf-8")).get("no_save_optim"))
    except (OSError, ValueError, AttributeError):
        return False


def _make_folder(path: str, flag: str) -> None:
    try:
        os.makedirs(os.path.expanduser(path), exist_ok=True)
    except OSError as e:
        raise UserError(
            f"cannot be written: {e.strerror}",
            file=path,
            field=f"--{flag}",
            remedy="name a folder on a disk that every node can write",
        ) from None
