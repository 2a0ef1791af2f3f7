"""What a model's folder says of the layers that `bvpo expand` has added, and when it does so no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

KEY = "bvpo_new_layers"  # of config.json; growth/grown_config.py writes it
NOTE = "expansion.json"


def forget_new_layers(folder: Path) -> None:
    """Take what `bvpo expand` has left out of a model's folder: once other layers were trained, too, the model without
    its new layers is no model that was there before, and must not be a later run's reference."""
    (folder / NOTE).unlink(missing_ok=True)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if KEY in found:
        del found[KEY]
        (folder / "config.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def carry_along(model: Path, exported: Path, new_layers_only: bool) -> None:
    """What ms-swift leaves out of what it exports: the model's own sampling settings and end-of-text tokens, and which
    of its layers are new, if these alone were trained."""
    for name in ("generation_config.json", NOTE):
        if (model / name).is_file():
            shutil.copy(model / name, exported)
    if not new_layers_only:
        forget_new_layers(exported)
