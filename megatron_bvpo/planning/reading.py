"""From a run's YAML file, or flag values, to checked `RunSettings`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import argv
from megatron_bvpo.launching.rivals import settle
from megatron_bvpo.launching.run_file import read_keys
from megatron_bvpo.planning.checks import check_settings, check_unread
from megatron_bvpo.planning.settings import NOT_PLANNED, RunSettings


def read_settings(file: str | Path, overrides: dict[str, Any] | None = None) -> RunSettings:
    """The settings of a YAML file, as `swift rlhf FILE` would read it; `overrides` win.

    Raises:
        UserError: no such file, no YAML mapping, a value of the wrong kind, or a setting that the plan does not know.
    """
    values, overrides = read_values(file), overrides or {}
    if values.get("rlhf_type", "bvpo") == "bvpo":  # of other methods, ms-swift decides what wins
        dropped, _ = settle(values, overrides, str(file))
        values = {key: value for key, value in values.items() if key not in dropped}
    return settings_from({**values, **overrides}, file=str(file))


def read_values(file: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML file, dashes in keys as underscores; raises UserError."""
    values = read_keys(str(file))
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def settings_from(values: dict[str, Any], file: str | None = None) -> RunSettings:
    """Settings from flag values; keys that do not change the plan are left out."""
    for key, understood, does in NOT_PLANNED:
        given = values.get(key, understood)
        if given not in (understood, None, [], "", False, 0):
            raise UserError(f"is {given!r}, which {does}: not planned", file=file, field=key, remedy="plan without it")
    known = {}
    for field in dataclasses.fields(RunSettings):
        if field.name in values:
            known[field.name] = _converted(field.name, str(field.type), values[field.name], file)
    settings = RunSettings(**known)
    if settings.max_length is None and not settings.packing_length:
        raise UserError(
            "is missing: how long a sequence may be decides the memory",
            file=file,
            field="max_length",
            remedy="add max_length: 4096, or what your traces need",
        )
    check_settings(settings, file)
    check_unread(values, settings, file)
    if settings.packing:  # ms-swift's own rule
        settings = dataclasses.replace(settings, padding_free=True)
    return settings


def _converted(name: str, kind: str, value: Any, file: str | None) -> Any:
    """`value` as the field's type; YAML writes booleans and numbers both as such and as text."""
    try:
        if value is None:
            return None if "None" in kind else getattr(RunSettings, name)
        if kind.startswith("tuple"):
            items = value if isinstance(value, (list, tuple)) else str(value).split()
            return tuple(float(x) for x in items) if "float" in kind else tuple(str(x) for x in items)
        if kind.startswith("bool"):
            text = str(value).lower()
            if text not in argv.TRUE | argv.FALSE:
                raise ValueError
            return text in argv.TRUE
        if isinstance(value, bool) and kind.startswith(("int", "float")):
            raise ValueError
        if kind.startswith("int"):
            number = int(value)
            if number != float(value):
                raise ValueError
            return number
        if kind.startswith("float"):
            return float(value)
        return json.dumps(value) if isinstance(value, dict) else str(value)
    except (TypeError, ValueError, OverflowError):
        wanted = {"b": "true or false", "i": "a whole number", "f": "a number", "t": "numbers"}[kind[0]]
        raise UserError(f"is {value!r}; expected {wanted}", file=file, field=name) from None
