"""Keys of a training, looked at before anything starts: what the run would refuse when its turn comes, hours later.

As far as it is known without ms-swift, the model and the rows: kinds, ranges, choices, streams, the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.combinations import check_optimizer, check_recomputation
from megatron_bvpo.launching.layout_rules import check_layout
from megatron_bvpo.launching.path_rules import check_data
from megatron_bvpo.launching.stream_flags import read_streams
from megatron_bvpo.launching.value_rules import AT_LEAST, OBJECTS, RANGES, check_values
from megatron_bvpo.planning.checks import check_choices, check_run, check_unread, of_key
from megatron_bvpo.planning.reading import typed
from megatron_bvpo.planning.settings import RunSettings
from megatron_bvpo.workflow.data_files import data_file, listed

# Keys that take one text, so that a list is a mistake.
_TEXTS = {field.name for field in dataclasses.fields(RunSettings) if str(field.type).startswith("str")}


def check_training(values: Mapping[str, Any], ranks: int | None) -> None:
    """
    Args:
        values: of a run's YAML file.
        ranks: that it will have; None: nobody can say.

    Raises:
        UserError: with `field` the key; no file and no line.
    """
    for key, value in values.items():
        _require_plain(key, value)
    try:
        check_values(SimpleNamespace(**{key: _number(key, value) for key, value in values.items()}))
        settings = typed(values)
        check_choices(settings)
        check_unread(values, settings)
        check_run(settings)
        for check in (check_recomputation, check_optimizer):
            check(settings)
        if settings.rlhf_type == "bvpo":
            read_streams(settings.bvpo_streams, settings.bvpo_weights, settings.bvpo_alpha)
            if values.get("train_iters") is None and values.get("num_train_epochs") is None:
                message = "is missing, and so is train_iters: how long is the run?"
                raise UserError(message, field="num_train_epochs", remedy="give one of the two")
        if ranks:
            check_layout(settings, ranks)
    except UserError as error:
        raise of_key(error) from None


def check_rows(values: Mapping[str, Any]) -> None:
    """Raise UserError, likewise, where the file of an entry of --dataset or --val_dataset is not there."""
    for key in ("dataset", "val_dataset"):
        for entry in listed(values.get(key)):
            check_entry(entry, key)


def check_entry(entry: str, key: str) -> None:
    """The same for one of them."""
    try:
        check_data([entry], key)
        data_file(entry)
    except UserError as error:
        what = f"{error.file}: {error.message}" if error.file else error.message
        raise UserError(what, field=key, remedy=error.remedy) from None


def _require_plain(key: str, value: Any) -> None:
    """A mapping only where the flag takes JSON; a list only where it takes several values, and not of lists."""
    several = isinstance(value, list)
    if isinstance(value, dict) and key not in (*OBJECTS, "ENV"):
        raise UserError(f"is {value!r}; expected a value", field=key)
    if several and (key in _TEXTS or any(isinstance(item, (list, dict)) for item in value)):
        raise UserError(f"is {value!r}; expected one value", field=key)


def _number(key: str, value: Any) -> Any:
    """As the run's parser reads it: what is no number's flag, as text."""
    read, wanted = (int, "a whole number") if key in AT_LEAST else (float, "a number")
    if key not in AT_LEAST and key not in RANGES:
        return value if isinstance(value, (dict, list)) else str(value)
    try:
        if isinstance(value, list) and key == "moe_aux_loss_coeff":
            return [read(str(item)) for item in value]
        return read(str(value))
    except ValueError:
        raise UserError(f"is {value!r}; expected {wanted}", field=key) from None
