"""Stand-ins for `torch.cuda`: "the current GPU" becomes the CPU.

What Megatron asks of `torch.cuda` falls in four kinds, and each is answered with what is true of a CPU run:
placement (`device="cuda"`, `Tensor.cuda`, `pin_memory`) means host memory; streams and events do nothing,
because CPU operations finish before they return; the random state is the CPU generator, which CPU dropout
draws from (so data loaders, which draw from it too, get one of their own); memory figures are 0.
`torch.cuda.is_available()` stays False, so that libraries which know how to run on a CPU do so;
`device_count()` counts this host's ranks, because Megatron seeds its generators only when there is a device.

`device="cuda"` is rewritten by a TorchFunctionMode. Replacing torch's factory functions by Python functions
instead would break `torch.jit.script`, which maps the builtins by identity. The mode holds in the thread that
installs it (autograd's CPU backward runs there too).
"""

from __future__ import annotations

import os
import time
import warnings
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Replace the `torch.cuda` calls; idempotent. Call it before megatron-core is imported.

    Raises:
        RuntimeError: torch sees a CUDA device, which these stand-ins would hide.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"torch sees {torch.cuda.device_count()} CUDA device(s); the torch.cuda stand-ins would hide "
            "them. Use install(device=False), or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        )
    # Compiling for the CPU costs minutes and changes nothing: torch.compile then runs the plain function, unless the
    # environment says 0.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    _replace_cuda_functions()
    _replace_tensor_methods()
    _change_data_loaders()
    torch.serialization.register_package(_BEFORE_CUDA, lambda storage: None, _load_on_cpu)
    _MeansCpu().__enter__()
    _installed = True


# ------------------------------------------------------------------------------------------- placement

_FACTORIES_THAT_PIN = frozenset(
    {torch.tensor, torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange,
     torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.randint, torch.randperm,
     torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_zeros}
)  # fmt: skip
_TAKES_DEVICE_BY_POSITION = frozenset({torch.Tensor.to})


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _MeansCpu(TorchFunctionMode):
    """`device="cuda"` (or an index) means the CPU; `pin_memory=True` is dropped."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory") and function in _FACTORIES_THAT_PIN:
                kwargs = {**kwargs, "pin_memory": False}
        else:
            kwargs = {}
        if function in _TAKES_DEVICE_BY_POSITION and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return function(*args, **kwargs)


_BEFORE_CUDA = 15  # torch asks its own CUDA restorer at 20


def _load_on_cpu(storage, location: str):
    """torch.load(map_location="cuda"), or of a file written on a GPU."""
    return storage if location.startswith("cuda") else None


def _replace_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_(self, dtype=None, non_blocking=False, **kwargs):
        # Megatron's optimizers sort parameters by this string and refuse what is not torch.cuda.*
        if dtype is None:
            # Under a TorchFunctionMode torch looks the method up by name and comes here twice.
            return "torch.cuda." + tensor_type(self).removeprefix("torch.").removeprefix("cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, non_blocking, **kwargs)

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


# ------------------------------------------------------------------------------------ streams and events


class Stream:
    """A CUDA stream on a machine where everything is finished when it returns."""

    cuda_stream = 0
    stream_id = 0
    device = _CPU

    def __init__(self, device=None, priority=0, **kwargs):
        self.priority = priority

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        event = event or Event(enable_timing=True)
        event.record(self)
        return event

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        _stack.append(self)
        return self

    def __exit__(self, *exception):
        _stack.pop()


class Event:
    """A CUDA event; it only remembers when it was recorded, for `elapsed_time` (milliseconds)."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self._at = None

    def record(self, stream=None):
        self._at = time.perf_counter()

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, end) -> float:
        return (end._at - self._at) * 1e3


_default_stream = Stream()
_stack = [_default_stream]


class _StreamContext:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        _stack.append(self.stream or _stack[-1])

    def __exit__(self, *exception):
        _stack.pop()


class _DeviceContext:
    """`with torch.cuda.device(index)`."""

    def __init__(self, device=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


# ------------------------------------------------------------------------------------------- torch.cuda


class _Generators:
    """`torch.cuda.default_generators[any index]` is the CPU's generator."""

    def __getitem__(self, index):
        return torch.default_generator

    def __len__(self):
        return _device_count()


def _device_count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device_properties(device=None):
    """An H100's compute capability: what is rehearsed is a run on one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="CPU stand-in",
        major=9,
        minor=0,
        total_memory=memory,
        multi_processor_count=1,
        gcnArchName="",  # torch.compile's cache asks a torch without CUDA for AMD's name
    )


def _free_and_total_memory(device=None) -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


def _set_rng_state(new_state, device=None) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


_host_generator = torch.Generator()


def _manual_seed_all(seed: int) -> None:
    """Also what `torch.manual_seed` calls, which seeds host and device."""
    _manual_seed(seed)
    _host_generator.manual_seed(int(seed))


def _change_data_loaders() -> None:
    """A DataLoader draws a seed from torch's CPU generator when an epoch starts. On a GPU that leaves dropout
    alone; here it would shift it, and a resumed run, which starts an epoch anew, would drop other units.
    And with `pin_memory` it walks each batch, in a thread of its own if it has workers: not without a device."""
    from torch.utils.data import dataloader

    start = dataloader._BaseDataLoaderIter.__init__

    def __init__(self, loader):
        device_state = torch.default_generator.get_state()
        torch.default_generator.set_state(_host_generator.get_state())
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'pin_memory' argument is set")
                start(self, loader)
        finally:
            _host_generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(device_state)
        self._pin_memory = loader.pin_memory

    dataloader._BaseDataLoaderIter.__init__ = __init__
    # What that thread asks for and sets.
    torch.accelerator.current_device_index = _returns(0)
    torch.accelerator.set_device_index = _returns(None)


def _returns(value):
    """A function of its own for every name: torch.compile's rules are keyed by function object, and two names
    with different rules on one object make `import torch._dynamo` fail."""

    def stand_in(*args, **kwargs):
        return value

    return stand_in


def _replace_cuda_functions() -> None:
    cuda = torch.cuda
    stand_ins = {
        "current_device": _returns(_CPU),
        "set_device": _returns(None),
        "device_count": _device_count,
        "get_device_name": lambda device=None: "CPU stand-in",
        "get_device_properties": _device_properties,
        "get_device_capability": lambda device=None: (9, 0),
        "synchronize": _returns(None),
        "empty_cache": _returns(None),
        "ipc_collect": _returns(None),
        "device": _DeviceContext,
        "Stream": Stream,
        "Event": Event,
        "stream": _StreamContext,
        "set_stream": _returns(None),
        "current_stream": lambda device=None: _stack[-1],
        "default_stream": lambda device=None: _default_stream,
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": _returns(None),
        "_lazy_call": lambda call, **kwargs: call(),
        "default_generators": _Generators(),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": _set_rng_state,
        "get_rng_state_all": lambda: [torch.default_generator.get_state()],
        "set_rng_state_all": lambda states: _set_rng_state(states[0]),
        "manual_seed": lambda seed: _manual_seed(seed),
        "manual_seed_all": _manual_seed_all,
        "seed": lambda: torch.default_generator.seed(),
        "initial_seed": lambda: torch.default_generator.initial_seed(),
        "mem_get_info": _free_and_total_memory,
        "memory_stats": lambda device=None: {},
    }
    for figure in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        stand_ins[figure] = _returns(0)
    for reset in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_reserved"):
        stand_ins[reset] = _returns(None)
    for name, value in stand_ins.items():
        setattr(cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(cuda.random, name, stand_ins[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _returns(None))
    cuda.nvtx.range = _Range


class _Range(_DeviceContext):
    def __init__(self, message=None, *args, **kwargs):
        pass
