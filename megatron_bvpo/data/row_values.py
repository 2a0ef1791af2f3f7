"""Fields of a row that are no text: labels and shares. A table may hold them as words."""

from typing import Any

_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def read_label(value: Any) -> bool | None:
    """true or false, also as 1 and 0 or as words; None for anything else."""
    return _LABELS.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None


def read_share(value: Any) -> float | None:
    """A number from 0 to 1, also as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        share = float(value)
    except (ValueError, OverflowError):
        return None
    return share if 0 <= share <= 1 else None
