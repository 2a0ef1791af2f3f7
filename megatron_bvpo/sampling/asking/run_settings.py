"""settings.json: what a folder was asked with. Another start may ask for more of the same, and for nothing else."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.prompts import PromptBook
from megatron_bvpo.sampling.samples import LOGS, OF_SOME_MODES, PROMPTS, SETTINGS, Prompt, write_shard, writing

VERSION = 1


def prepare(folder: Path, settings: dict[str, Any], book: PromptBook) -> list[str]:
    """Makes the folder, or checks that it holds samples of the same kind. Returns lines on what has grown.

    `samples` and `modes` may grow: the samples that are there stay what they are.

    Raises:
        UserError: the folder holds something else, or samples that were asked for in another way, or cannot be made.
    """
    path = folder / SETTINGS
    if not path.is_file():
        _check_fresh(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder / PROMPTS, book, Prompt)
        _write(path, settings)
        return []
    old = read(folder)
    grown = []
    if differences := [line for key in {**old, **settings} if (line := _difference(key, old, settings, grown))]:
        raise UserError(
            f"holds samples of other settings: {'; '.join(differences)}",
            file=str(folder),
            remedy="give the settings of before, or another --out",
        )
    if grown:
        _write(path, settings)
    return grown


def read(folder: Path) -> dict[str, Any]:
    """The settings of a folder.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {error}", file=str(path), remedy="restore it, or give another --out"
        ) from None
    return found


def _check_fresh(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", file=str(folder), remedy="give a folder with --out")
    # prompts.parquet is written before the settings: a stop between the two leaves it alone. Engines start before both.
    others = [path.name for path in folder.glob("*") if path.name not in (PROMPTS, LOGS)]
    if others:
        raise UserError(
            f"holds other files ({', '.join(sorted(others)[:3])}) and no settings.json",
            file=str(folder),
            remedy="give an empty or a new folder with --out",
        )


def _difference(key: str, old: dict, new: dict, grown: list[str]) -> str | None:
    was, now = old.get(key), new.get(key)
    if was == now:
        return None
    if key == "samples" and isinstance(was, int) and not new.get("budget") and now > was:
        grown.append(f"samples: {was} before, {now} now; those that are there stay")
        return None
    if key == "modes" and not new.get("budget") and set(was or ()) < set(now):
        grown.append(f"modes: {', '.join(was)} before, {', '.join(now)} now; the samples that are there stay")
        return None
    if was is None and key in OF_SOME_MODES:
        return None  # a mode that was not asked for before
    if key == "prompts":
        return f"other prompts ({_count(was)} before, {_count(now)} now)"
    return f"{key} {_told(was)} before, {_told(now)} now"


def _count(prompts: Any) -> str:
    return str(prompts.get("count")) if isinstance(prompts, dict) else "none"


def _told(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _write(path: Path, settings: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        aside.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(aside, path)
