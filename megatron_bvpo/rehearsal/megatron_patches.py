"""What of megatron-core cannot run in float32 on CPU tensors, replaced when its module is imported.

Importing megatron-core takes seconds and must come after the stand-ins, so nothing is imported here: a finder
waits for the modules and patches each as soon as it is executed, before `token_dispatcher` takes its function
by name. Modules that are already imported are patched at once. On a GPU every patch is without effect, but for
`_load_without_gradients`, which float32 needs there too.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from types import ModuleType

_MOE_UTILS = "megatron.core.transformer.moe.moe_utils"
_TOKEN_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
_RANDOM = "megatron.core.tensor_parallel.random"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_HYBRID_OPTIMIZER = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"


def patch_megatron() -> None:
    """Patch megatron-core now where it is imported, else on import. Idempotent.

    Raises:
        RuntimeError: the installed megatron-core lacks a function that is to be replaced.
    """
    for name, patch in _PATCHES.items():
        module = sys.modules.get(name)
        if module is not None:
            patch(module)
    if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchOnImport())


def _convert_on_cpu(module: ModuleType) -> None:
    """`maybe_move_tensor_to_cpu` leaves a CPU tensor alone, even when a numpy array is asked for."""
    original = _target(module, "maybe_move_tensor_to_cpu")
    if hasattr(original, "__wrapped__"):
        return

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        moved = original(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    maybe_move_tensor_to_cpu.__wrapped__ = original
    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _run_lazy_calls_at_once(module: ModuleType) -> None:
    """Its `_lazy_call` may be torch's own, which queues until CUDA starts: the seed would never be set."""
    import torch

    _target(module, "_lazy_call")
    module._lazy_call = torch.cuda._lazy_call
    module._lazy_init = torch.cuda._lazy_init
    module.device_ctx_manager = torch.cuda.device


def _load_without_gradients(module: ModuleType) -> None:
    """Resuming copies into the optimizer's parameters. In float32 these are views of the model's, which require
    gradients, and megatron-core forgets `no_grad`; bf16 training has detached float32 copies instead."""
    import torch

    owner = _target(module, "DistributedOptimizer")
    original = _target(owner, "_set_main_param_and_optimizer_states")
    if not hasattr(original, "__wrapped__"):
        owner._set_main_param_and_optimizer_states = torch.no_grad()(original)  # sets __wrapped__


def _tell_host_from_device(module: ModuleType) -> None:
    """`--optimizer_cpu_offload` copies to the host what `is_cuda`, which in a rehearsal is nothing. While it sorts
    the parameters, whatever did not come out of `Tensor.cpu` counts as on the device."""
    import torch
    from torch.overrides import TorchFunctionMode

    owner = _target(module, "HybridDeviceOptimizer")
    original = _target(owner, "_get_sub_optimizer_param_groups")
    if hasattr(original, "__wrapped__") or torch.cuda.is_available():
        return
    copies = {torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float, torch.Tensor.pin_memory}

    class HostAndDevice(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.on_host = {}  # by id, with the tensor, so that no other one gets its id

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function == torch.Tensor.is_cuda.__get__:  # a new wrapper at every look
                return id(args[0]) not in self.on_host
            result = function(*args, **(kwargs or {}))
            if function is torch.Tensor.cpu or (function in copies and id(args[0]) in self.on_host):
                self.on_host[id(result)] = result
            return result

    @functools.wraps(original)
    def sort(self, offload_fraction):
        with HostAndDevice():
            return original(self, offload_fraction)

    owner._get_sub_optimizer_param_groups = sort


_PATCHES = {
    _MOE_UTILS: _convert_on_cpu,
    _TOKEN_DISPATCHER: _convert_on_cpu,
    _RANDOM: _run_lazy_calls_at_once,
    _DISTRIBUTED_OPTIMIZER: _load_without_gradients,
    _HYBRID_OPTIMIZER: _tell_host_from_device,
}


def _target(owner, name: str):
    if not hasattr(owner, name):
        raise RuntimeError(
            f"{owner.__name__} has no {name}: this megatron-core is not one the CPU rehearsal "
            "knows (checked with 0.16.1 and 0.19.2). Install one of these, or update "
            "megatron_bvpo/rehearsal/megatron_patches.py."
        )
    return getattr(owner, name)


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it wraps the loader that the other finders give for the modules in `_PATCHES`."""

    def find_spec(self, fullname, path=None, target=None):
        patch = _PATCHES.get(fullname)
        if patch is None:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _PatchOnImport):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module, execute=execute):
                    execute(module)
                    patch(module)

                spec.loader.exec_module = exec_module
                return spec
        return None
