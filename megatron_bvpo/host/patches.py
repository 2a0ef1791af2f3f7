"""The only patches of other libraries, each with its reason. A target that is gone raises at start.

What could be done by subclassing or by setting attributes is not here: see training/trainer.py and
host/parallel_attributes.py.
"""

from __future__ import annotations

from contextlib import contextmanager


class PatchTargetMissing(RuntimeError):
    """A library changed under us: the named target is not there any more."""


def _target(owner: object, name: str):
    try:
        return getattr(owner, name)
    except AttributeError:
        raise PatchTargetMissing(
            f"{owner!r} has no {name}: this version of the library is not the one that BVPO was built against; "
            "`bvpo doctor` lists the supported versions"
        ) from None


def apply_patches() -> None:
    """Apply all patches; a second call changes nothing."""
    _keep_empty_columns()
    _bypass_router_lora()
    _trust_offloaded_optimizers()


def _keep_empty_columns() -> None:
    """ms-swift drops dataset columns it does not know; ours must reach the template.

    `--remove_unused_columns false` would keep them too, but then every unknown column joins the batch.
    """
    from swift.dataset import RowPreprocessor

    from megatron_bvpo.data.batches import ROW_KEY
    from megatron_bvpo.data.loading import EMPTY_COLUMNS

    known = _target(RowPreprocessor, "standard_keys")
    for column in (*EMPTY_COLUMNS, ROW_KEY):
        if column not in known:
            known.append(column)


def _bypass_router_lora() -> None:
    """mcore-bridge adds a router's LoRA in a patched `gating`, even while adapters are disabled or merged.

    With `all-router` the adapters-off reference would then move with the policy.
    """
    from mcore_bridge import LoraParallelLinear

    original = _target(LoraParallelLinear, "_patch_router_gating")
    if getattr(original, "bvpo", False):  # `__wrapped__` says nothing: contextmanager sets it on the original too
        return

    @contextmanager
    def _patch_router_gating(self):
        if self.disable_adapters or self.merged:
            yield
        else:
            with original(self):
                yield

    _patch_router_gating.bvpo = True
    _patch_router_gating.__wrapped__ = original
    LoraParallelLinear._patch_router_gating = _patch_router_gating


def _trust_offloaded_optimizers() -> None:
    """An offloaded optimizer's checkpoint names the classes of its optimizers, and torch.load refuses unknown ones.

    With `--optimizer_cpu_offload` no checkpoint could be resumed (torch 2.6 and later: `weights_only` is the default).
    """
    import torch
    from megatron.core import optimizer

    torch.serialization.add_safe_globals([_target(optimizer, name) for name in ("Adam", "SGD", "CPUAdam", "CPUSGD")])
