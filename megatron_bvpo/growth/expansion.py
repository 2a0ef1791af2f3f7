"""A model's folder → a folder with the grown model: checks, what it will take, and the writing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import megatron_bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.export.new_folder import copy_others
from megatron_bvpo.export.tensor_files import INDEX, TYPES, ModelFiles
from megatron_bvpo.growth import transport
from megatron_bvpo.growth.grown_config import FIELD, NEW_LAYERS, NOTE, grown_config, require_known
from megatron_bvpo.growth.layer_choice import new_numbers, places
from megatron_bvpo.growth.layers import Layer, Sizes, layers_of, sizes_of
from megatron_bvpo.growth.memory_needed import GIB, LIBRARIES, needed
from megatron_bvpo.growth.new_files import NewFile, Shards, copy_renamed, renamed, shards_of
from megatron_bvpo.growth.new_layer import new_layer, zeroed


@dataclass(frozen=True)
class Expansion:
    """What will be done.

    Attributes:
        model: the old one.
        layers: its layers.
        sizes: of each.
        places: numbers of the old layers that a new one follows.
        shards: the files to come.
        memory: bytes that it takes, Python and its libraries included.
    """

    model: ModelFiles
    layers: list[Layer]
    sizes: Sizes
    places: list[int]
    shards: Shards
    memory: int

    @property
    def new(self) -> dict[int, int]:
        """Place → number of its new layer in the grown model."""
        return new_numbers(self.places, len(self.layers))[1]


def read_model(folder: Path, given: str, memory_gib: float) -> Expansion:
    """What growing this model means, without reading a weight.

    Args:
        given: `upper-half` or a list of places.
        memory_gib: how much it may take.

    Raises:
        UserError: a model that cannot be grown, places that are not there, or more memory than it may take.
    """
    model = ModelFiles(folder, FIELD)
    count = require_known(model)
    sizes = sizes_of(model.config, str(folder / "config.json"))
    layers = layers_of(model, sizes, count)
    chosen = places(given, count)
    itemsize = max(TYPES[next(iter(layer.entries.values())).dtype].itemsize for layer in layers)
    memory = needed(sizes, itemsize) + LIBRARIES
    if memory > memory_gib * GIB:
        raise UserError(
            f"growing this model takes {memory / GIB:.1f} GiB, and {memory_gib:g} are allowed",
            field="--memory",
            remedy=f"give --memory {int(memory / GIB) + 1} on a machine that has them",
        )
    return Expansion(model, layers, sizes, chosen, shards_of(model, chosen, count), int(memory))


def write(expansion: Expansion, out: Path, say: Callable[[str], None]) -> None:
    """Fill a new folder.

    Raises:
        UserError: a weight that is no number.
        OSError: a file cannot be read or written.
    """
    model, shards = expansion.model, expansion.shards
    (out / "config.json").write_text(json.dumps(grown_config(model.config, expansion.places), indent=2) + "\n")
    (out / NOTE).write_text(json.dumps(_note(expansion), indent=1) + "\n")
    copy_others(model.folder, out)
    old_numbers, _ = new_numbers(expansion.places, len(expansion.layers))
    for place, file in shards.new.items():  # the long part first, so that a bad weight shows before much is copied
        began = time.monotonic()
        _write_layer(expansion, place, out / file)
        number = expansion.new[place]
        say(f"layer {number}: between {place} and {place + 1} of the old ones ({time.monotonic() - began:.0f} s)")
    for source, file in shards.old.items():
        copy_renamed(source, out / file, lambda name: renamed(name, old_numbers))
    (out / INDEX).write_text(json.dumps(shards.index, indent=2) + "\n")


def _write_layer(expansion: Expansion, place: int, path: Path) -> None:
    prefix = f"model.layers.{expansion.new[place]}."
    lower, upper = expansion.layers[place : place + 2]
    file = NewFile(path, expansion.shards.tensors[place])
    for name in zeroed(upper.entries):
        file.write_zeros(prefix + name)
    for name, values in new_layer(lower, upper, expansion.sizes):
        file.write(prefix + name, values)
        del values  # or it would be held while the next is made
    file.close()


def _note(expansion: Expansion) -> dict:
    """expansion.json: which layers are new, and how they were made."""
    from importlib.metadata import version

    units = ["key-value heads with their query heads", "MLP neurons"]
    if expansion.sizes.experts:
        units.append("whole experts with their rows of the router")
    zero = {re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in zeroed(expansion.layers[0].entries)}
    return {
        "model": expansion.model.folder.resolve().name,
        "layers_before": len(expansion.layers),
        "layers": len(expansion.layers) + len(expansion.places),
        NEW_LAYERS: sorted(expansion.new.values()),
        "new_layers": [
            {"layer": number, "between_old_layers": [place, place + 1]} for place, number in expansion.new.items()
        ],
        "made_by": "the mean of both neighbours, the lower one transported to the upper one's order",
        "transport": {
            "solver": f"Sinkhorn of POT {version('POT')}",
            "regularisation": transport.REGULARISATION,
            "cost": "cosines, each unit's moved and scaled: 0 the most alike, 1 the mean and what is farther",
            "units": units,
        },
        "zeroed": sorted(zero),
        "megatron_bvpo": megatron_bvpo.__version__,
    }
