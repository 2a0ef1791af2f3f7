"""Checkpoints that are whole or not there: staging, the state file, and each rank's random state.

ms-swift writes a checkpoint in place, so a killed run can leave half of one under its final name. Here
it is written below `<output_dir>/.saving` and renamed once everything is on disk; `bvpo_state.json`,
written last, says that it is whole.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from swift.utils import LAST_CHECKPOINT_SYMLINK, update_last_checkpoint_symlink

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.adapter_folders import PER_EXPERT

STATE_FILE = "bvpo_state.json"
STATE_FORMAT = 1
STAGING = ".saving"
RNG_FOLDER = "bvpo_rng"
REPLACED = ".replaced"


def is_whole(checkpoint: str | os.PathLike) -> bool:
    return (Path(checkpoint) / STATE_FILE).is_file()


def checkpoint_of(exported: str | os.PathLike) -> Path | None:
    """The whole checkpoint that a Hugging Face adapter or model was saved with; None where there is none of ours."""
    folder = Path(exported).resolve()
    candidates = (folder, folder.with_name(folder.name.removesuffix("-merged")), folder.parent)
    return next((home for home in candidates[: 3 if folder.name == PER_EXPERT else 2] if is_whole(home)), None)


def _put_back_replaced(output_dir: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    for replaced in output_dir.glob(f"checkpoint-*{REPLACED}"):
        target = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not target.exists():
            try:
                os.rename(replaced, target)
            except FileNotFoundError:
                pass  # another rank was faster


def require_whole_checkpoint(checkpoint: str, *, flag: str) -> None:
    """Raises UserError where `checkpoint` is no whole checkpoint of this project."""
    path = Path(checkpoint).resolve()
    output_dir = path.parent.parent if path.parent.name == STAGING else path.parent
    _put_back_replaced(output_dir)
    if is_whole(path):
        return
    whole = whole_checkpoints(output_dir)
    remedy = f"the newest whole checkpoint there is {whole[-1]}" if whole else "no whole checkpoint is beside it"
    if not path.exists():
        raise UserError(f"there is no checkpoint {checkpoint}", field=flag, remedy=remedy)
    raise UserError(
        f"{checkpoint} has no {STATE_FILE}: it is half-written, or no checkpoint of BVPO",
        field=flag,
        remedy=remedy,
    )


def read_state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The state file of a whole checkpoint; raises UserError where it cannot be read."""
    path = Path(checkpoint) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != STATE_FORMAT:
            raise UserError(
                f"format {state['format']}; this version reads format {STATE_FORMAT}",
                file=str(path),
                remedy="resume with the version of megatron-bvpo that wrote it",
            )
        return state
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"cannot be read: {e}", file=str(path), remedy="use an older checkpoint") from None


def write_state(checkpoint: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write the state file in one step: it is there whole or not at all."""
    path = Path(checkpoint) / STATE_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"format": STATE_FORMAT, **state}, indent=1), encoding="utf-8")
    os.replace(partial, path)


def clear_staging(output_dir: str | os.PathLike) -> None:
    """Remove what a killed run left half-written or half-removed."""
    output_dir = Path(output_dir)
    _put_back_replaced(output_dir)
    for replaced in output_dir.glob(f"checkpoint-*{REPLACED}"):
        remove_checkpoint(replaced)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def open_staging(output_dir: str | os.PathLike) -> Path:
    """An empty staging folder with the run's args.json, where ms-swift expects it."""
    clear_staging(output_dir)
    staging = Path(output_dir) / STAGING
    staging.mkdir(parents=True)
    args_file = Path(output_dir) / "args.json"
    if args_file.exists():
        shutil.copy(args_file, staging / "args.json")
    return staging


def publish(staging: Path, name: str) -> Path:
    """Rename `<staging>/name` (and `name-merged`, first) beside the staging folder; returns the new path."""
    output_dir = staging.parent
    if is_whole(output_dir / name):  # a resumed run saves the same iteration again
        _link_another(output_dir, name)
    for folder in (f"{name}-merged", name):
        source, target = staging / folder, output_dir / folder
        if not source.exists():
            continue
        replaced = target.with_name(f"{folder}{REPLACED}")
        if target.exists():
            remove_checkpoint(replaced)
            os.rename(target, replaced)
        os.rename(source, target)
        remove_checkpoint(replaced)
    point_last_checkpoint(output_dir, name)
    shutil.rmtree(staging, ignore_errors=True)
    return output_dir / name


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed on the way, it is not whole any more, whatever files are left."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(checkpoints: list[str], limit: int) -> None:
    """Remove all but the last `limit` of `checkpoints`, each with its merged weights."""
    for folder in checkpoints[:-limit]:
        remove_checkpoint(Path(folder))
        remove_checkpoint(Path(f"{folder}-merged"))


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest iteration last."""
    found = (p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and is_whole(p))
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def _link_another(output_dir: Path, name: str) -> None:
    """`last-checkpoint` must not dangle while the checkpoint it points at is replaced."""
    others = [p.name for p in whole_checkpoints(output_dir) if p.name != name]
    if others and (output_dir / LAST_CHECKPOINT_SYMLINK).resolve().name == name:
        point_last_checkpoint(output_dir, others[-1])


def point_last_checkpoint(output_dir: Path, name: str) -> None:
    update_last_checkpoint_symlink(str(output_dir / name))


def random_state() -> dict[str, Any]:
    """This rank's random state, the dropout masks' included.

    Megatron keeps one data-parallel rank's and gives it to all, but the ranks' states drift apart: each
    draws dropout masks of its own lengths.
    """
    from megatron.core import tensor_parallel

    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    return {
        "python": [version, list(words), python_gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` found."""
    from megatron.core import tensor_parallel

    version, words, python_gauss = state["python"]
    random.setstate((version, tuple(words), python_gauss))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def save_random_state(checkpoint: str | os.PathLike, rank: int, state: dict[str, Any]) -> None:
    """Keep one rank's random state with a checkpoint."""
    folder = Path(checkpoint) / RNG_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"rank_{rank:05d}.pt")


def load_random_state(checkpoint: str | os.PathLike, rank: int) -> dict[str, Any]:
    """What `save_random_state` kept."""
    return torch.load(Path(checkpoint) / RNG_FOLDER / f"rank_{rank:05d}.pt", weights_only=True)


# What of the schedule Megatron takes from the checkpoint, whatever the flags say.
SCHEDULE = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "start_wd", "end_wd")


def schedule_of(scheduler: Any) -> dict[str, Any]:
    """The part of a Megatron scheduler's settings that a checkpoint replaces; `…_steps` count rows."""
    return {name: getattr(scheduler, name) for name in SCHEDULE}


def schedule_changes(asked: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    """A line for each setting that the checkpoint holds otherwise than the flags."""
    return [
        f"The checkpoint's {name} goes on, {loaded[name]}, and not this run's {asked[name]}."
        for name in SCHEDULE
        if loaded[name] != asked[name]
    ]


def merge_needs_more(local_bytes: int, local_ranks: int, available: int) -> str | None:
    """Why a node's host memory cannot hold its ranks' base weights beside what is there, or None."""
    needed = local_bytes * local_ranks
    if needed <= 0.9 * available:
        return None
    return f"{needed / 2**30:.1f} GiB for {local_ranks} ranks, {available / 2**30:.1f} GiB are available"
