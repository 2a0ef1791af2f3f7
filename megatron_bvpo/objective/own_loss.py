"""A user's own loss by the name of its function: `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from megatron_bvpo.errors import UserError


def is_own(name: str) -> bool:
    """Whether the name is one of a user's own function."""
    return ":" in name


def own_function(name: str, known: Sequence[str], flag: str) -> str | Callable:
    """`name` if it is one of `known`, else the function that `module:function` names.

    The module is looked for as Python looks for any: installed, or on PYTHONPATH.

    Raises:
        UserError: neither one nor the other.
    """
    if name in known:
        return name
    expected = f"expected {', '.join(known)}, or module:function of your own"
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"is {name!r}; {expected}", field=flag)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does while it is loaded
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = "put the module's folder on PYTHONPATH, or install it"
        raise UserError(f"{name!r} cannot be loaded ({said})", field=flag, remedy=remedy) from None
    if not callable(found):
        raise UserError(f"{name!r} is no function; {expected}", field=flag)
    return found
