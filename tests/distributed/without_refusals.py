"""Hooks that let a run do what is refused, to see what would become of it."""

from __future__ import annotations

import importlib.machinery
import sys
import types


def allow_everything(base, folder, packages: tuple[str, ...] = ()):
    """No refusal of launching/refusals.py; `packages` are there, and empty."""
    import megatron_bvpo.training.arguments as arguments

    arguments.refuse_unsupported = lambda args: None
    for name in packages:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    return base
