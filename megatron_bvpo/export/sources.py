"""What stands in the folder that a user names: an adapter or a whole model, and the model it was trained from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_bvpo.errors import UserError, or_bound
from megatron_bvpo.export.tensor_files import INDEX, SINGLE, ModelFiles, read_json
from megatron_bvpo.launching.adapter_folders import PER_EXPERT, WEIGHTS

STATE_FILE = "bvpo_state.json"  # of host/checkpoint.py, which needs ms-swift to be imported
FIELD = "CHECKPOINT"


@dataclass(frozen=True)
class Source:
    """What is to be exported.

    Attributes:
        kind: an adapter, or a whole model (full tuning, or one that the run has merged).
        folder: that holds its safetensors.
        checkpoint: the folder that was named, links followed; or the merged model beside it.
        args: the run's args.json; {} for an adapter without one.
        state: its bvpo_state.json; {} likewise.
    """

    kind: Literal["adapter", "model"]
    folder: Path
    checkpoint: Path
    args: dict[str, Any]
    state: dict[str, Any]

    @property
    def trained_from(self) -> str | None:
        """The model's name or folder in the run's own words."""
        return self.args.get("model")


def find_source(given: str) -> Source:
    """The adapter or model in a checkpoint, or in a folder that holds just that.

    Raises:
        UserError: nothing is there, a run's folder, half a checkpoint, or Megatron's files alone.
    """
    folder = Path(given).resolve()
    if not folder.is_dir():
        raise UserError(f"there is no folder {given}", field=FIELD, remedy=f"check that it is mounted{or_bound()}")
    if folder.parent.name == ".saving":
        raise UserError(f"{given} is still being written", field=FIELD, remedy="wait until it has left .saving")
    last = folder / "last-checkpoint"
    if last.exists():
        raise UserError(
            f"{given} is a run's folder", field=FIELD, remedy=f"give one of its checkpoints, such as {last}"
        )
    adapter = next((f for f in (folder / PER_EXPERT, folder) if (f / WEIGHTS).is_file()), None)
    merged = folder.with_name(f"{folder.name}-merged")
    if adapter is None and not _holds_model(folder) and (folder / STATE_FILE).is_file() and _holds_model(merged):
        folder = merged  # whole layers were trained beside the adapter, which alone is no model
    whole = _holds_model(folder)
    home = folder.parent if folder.name == PER_EXPERT else folder.with_name(folder.name.removesuffix("-merged"))
    states = (folder / STATE_FILE, home / STATE_FILE)
    state = next((read_json(file) for file in states if file.is_file()), {})
    if adapter is None and not whole:
        raise UserError(
            f"{given} holds neither {WEIGHTS} nor {SINGLE}: "
            + ("Megatron's own files alone" if any(folder.glob("iter_*")) else "it is no checkpoint"),
            field=FIELD,
            remedy="give a checkpoint of a run with --save_safetensors true (ms-swift's default), "
            "or convert it with swift export --to_hf true first",
        )
    if not isinstance(state.get("model") or {}, dict):
        raise UserError(f"is damaged: the model is {state['model']!r}", file=str(home / STATE_FILE))
    args = read_json(folder / "args.json") or read_json(home / "args.json")
    return Source("model" if adapter is None else "adapter", adapter or folder, folder, args, state)


def _holds_model(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def find_model(source: Source, given: str | None) -> ModelFiles | None:
    """The files of the model that the run began with; None where nobody named a folder that is here.

    Args:
        given: --model, which goes before what the run's args.json has.

    Raises:
        UserError: `given` is no local folder with a model, or the model is another one than the run's.
    """
    named = [source.args.get("model_dir"), source.args.get("model")] if given is None else [given]
    folder = next((Path(name) for name in named if name and Path(name).is_dir()), None)
    if folder is None:
        if given is not None:
            raise UserError(
                f"there is no folder {given}", field="--model", remedy=f"check that it is mounted{or_bound()}"
            )
        return None
    model = ModelFiles(folder.resolve(), "--model")
    _require_same_model(source, model)
    return model


def require_model(source: Source, model: ModelFiles | None, why: str) -> ModelFiles:
    if model is None:
        named = source.trained_from
        raise UserError(
            f"{why} needs the model that the run was started from"
            + (f", {named}, and it is no folder on this machine" if named else ", and nothing here names it"),
            field="--model",
            remedy="give its folder with --model",
        )
    return model


def _require_same_model(source: Source, model: ModelFiles) -> None:
    """By the config; the shapes of the layers follow when they are read."""
    here = model.text_config
    saved = source.state.get("model") or {}
    differing = [name for name, value in saved.items() if name in here and value is not None and here[name] != value]
    if differing:
        what = ", ".join(f"{name} {saved[name]} there and {here[name]} here" for name in differing)
        raise UserError(
            f"the checkpoint is of another model: {what}",
            file=str(model.folder / "config.json"),
            field="--model",
            remedy=f"give the model that the run was started from ({source.trained_from})",
        )
