"""How recorders look at the parts of a trainer, and change them."""

from __future__ import annotations

import functools
from collections.abc import Callable


def around(owner, name: str, new: Callable) -> None:
    """From now on `owner.name(…)` calls `new(stock, …)`, with what it was; `owner` may be frozen."""
    object.__setattr__(owner, name, functools.partial(new, getattr(owner, name)))
