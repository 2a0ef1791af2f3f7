"""A saved LoRA adapter as pairs of factors, one pair for each layer and each expert, and what they are added to.

    W[path] += scale · B @ A        scale = lora_alpha / r, or lora_alpha / √r under rsLoRA

Shapes: R rank, I input and O output features; A is [R, I], B is [O, R].
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.tensor_files import TYPES, Entry, read_entries, read_json, read_rows
from megatron_bvpo.launching.adapter_folders import CONFIG, NO_PLACE, PER_EXPERT, WEIGHTS

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)")
# The projections of one expert in the parameters that hold all experts, with the part of a parameter's rows.
FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}


@dataclass(frozen=True)
class Update:
    """Rows [first, first + O) of a tensor, seen as [rows, I], get scale · B @ A."""

    first: int
    path: str


class Adapter:
    """An adapter's folder: adapter_config.json and adapter_model.safetensors.

    Attributes:
        factors: module path → (A, B), as entries of the file.
        whole: parameter name → entry of a module that was trained and saved whole.
        scale: what B @ A is multiplied with.

    Raises:
        UserError: not whole, of a kind that makes another update than the formula above, in peft's form of fused
            experts, or with factors whose shapes do not fit each other.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / WEIGHTS
        self.config = read_json(folder / CONFIG)
        self.entries = read_entries(self.file)
        self._check_config()
        self.rank = self._whole_number("r")
        alpha = self.config["lora_alpha"]
        self.scale = alpha / math.sqrt(self.rank) if self.config.get("use_rslora") else alpha / self.rank
        self.factors: dict[str, tuple[Entry, Entry]] = {}
        self.whole: dict[str, Entry] = {}
        self._pair_factors()

    def _whole_number(self, name: str) -> int:
        found = self.config.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise self._config_error(f"is {found!r}, expected a whole number above 0", name)
        return found

    def _config_error(self, message: str, field: str, remedy: str | None = None) -> UserError:
        return UserError(message, file=str(self.folder / CONFIG), field=field, remedy=remedy)

    def _check_config(self) -> None:
        if self.config.get("target_parameters"):
            raise self._config_error(
                "this is peft's form of fused experts, which other engines do not read",
                "target_parameters",
                f"give the whole checkpoint, whose folder {PER_EXPERT} has one pair of factors for each expert",
            )
        for name, harmless in NO_PLACE.items():
            if self.config.get(name) not in harmless:
                remedy = "merge it with peft (merge_and_unload)"
                raise self._config_error(f"is {self.config[name]!r}, which no export here knows", name, remedy)
        if self.config.get("bias", "none") != "none":
            raise self._config_error(
                f"is {self.config['bias']!r}, and engines have no biases in adapters",
                "bias",
                "use lora_bias none",
            )
        alpha = self.config.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < math.inf:
            raise self._config_error(f"is {alpha!r}, expected a number other than 0", "lora_alpha")

    def _pair_factors(self) -> None:
        sides: dict[str, dict[str, Entry]] = defaultdict(dict)
        for name, entry in self.entries.items():
            plain = name.removeprefix(PREFIX)
            found = _FACTOR.fullmatch(plain)
            if found is not None:
                sides[found["path"]][found["side"]] = entry
            elif ".lora_" in plain:
                raise UserError(f"{name} is no factor of a linear layer", file=str(self.file))
            else:
                self.whole[plain] = entry
            if entry.dtype not in TYPES:
                raise UserError(f"{name} is {entry.dtype}, expected a floating-point type", file=str(self.file))
        for path, pair in sides.items():
            a, b = pair.get("A"), pair.get("B")
            if a is None or b is None:
                lacking = "A" if a is None else "B"
                raise UserError(
                    f"{path} has no lora_{lacking}: a part of the adapter is missing",
                    file=str(self.file),
                    remedy="take another checkpoint",
                )
            if (len(a.shape), len(b.shape), a.shape[0], b.shape[-1]) != (2, 2, self.rank, self.rank):
                raise UserError(
                    f"{path} has factors {list(a.shape)} and {list(b.shape)}, expected rank {self.rank}",
                    file=str(self.file),
                    field="r",
                )
            self.factors[path] = (a, b)
        if not sides:
            raise UserError("holds no LoRA factors", file=str(self.file))

    def delta(self, path: str) -> tuple[Tensor, Tensor]:
        """(A, scale · B) in float64. Raises UserError where one of them holds what is no number."""
        a, b = (read_rows(entry, 0, entry.shape[0]).double() for entry in self.factors[path])
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(
                f"{path} has factors that are no numbers (nan, infinite)",
                file=str(self.file),
                remedy="take an earlier checkpoint",
            )
        return a, b * self.scale

    def experts(self) -> dict[str, dict[int, set[str]]]:
        """`….experts` → number of an expert → its adapted projections."""
        found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for expert in filter(None, map(EXPERT.fullmatch, self.factors)):
            found[expert["experts"]][int(expert["index"])].add(expert["projection"])
        return found


def updates(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], where: str, transposed: Callable[[str], Any] | None = None
) -> dict[str, list[Update]]:
    """Tensor name → the updates of its rows. Every factor has a place, or it is an adapter of another model.

    Args:
        shapes: of the model's tensors, by name.
        where: names the model in errors.
        transposed: `….experts` → whether its fused parameters are [E, I, O]; without it a square one is refused,
            since nothing tells.

    Raises:
        UserError: a layer that the model lacks, or one of another shape.
    """
    found: dict[str, list[Update]] = defaultdict(list)
    for path, (a, b) in adapter.factors.items():
        name, first, expected = f"{path}.weight", 0, (b.shape[0], a.shape[1])
        expert = EXPERT.fullmatch(path)
        if name not in shapes and expert is not None and expert["projection"] in FUSED:
            fused, part = FUSED[expert["projection"]]
            name = f"{expert['experts']}.{fused}"
            shape = shapes.get(name, ())
            rows = 2 * b.shape[0] if fused == "gate_up_proj" else b.shape[0]
            first, expected = int(expert["index"]) * rows + part * b.shape[0], (*shape[:1], rows, a.shape[1])
            if shape == expected and rows == a.shape[1]:
                _require_known_order(name, expert["experts"], where, transposed)
            if shape and int(expert["index"]) >= shape[0]:
                raise _of_another_model(adapter, f"{path} is an expert beyond its {shape[0]}", where)
        if name not in shapes:
            raise _of_another_model(adapter, f"nothing there is called {name}", where)
        if tuple(shapes[name]) != expected:
            raise _of_another_model(adapter, f"{name} is {list(shapes[name])} there, {list(expected)} here", where)
        found[name].append(Update(first, path))
    for name, entry in adapter.whole.items():
        there = tuple(shapes.get(name, ()))
        if there != entry.shape:
            raise _of_another_model(adapter, f"{name} is {list(there)} there, {list(entry.shape)} here", where)
    return dict(found)


def _require_known_order(name: str, experts: str, where: str, transposed) -> None:
    if transposed is None or transposed(experts):
        raise UserError(
            f"{name} is square for each expert, so that nothing tells its rows from its columns",
            file=where,
            remedy="have the run write the merged model (--merge_lora true)",
        )


def _of_another_model(adapter: Adapter, what: str, where: str) -> UserError:
    return UserError(
        f"the adapter {adapter.folder} is of another model: {what}",
        file=where,
        field="--model",
        remedy="give the model that the run was started from",
    )
