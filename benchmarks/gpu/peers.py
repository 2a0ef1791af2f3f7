"""Other people's target log-probs, each behind `make(**options) → f(x_NH, weight_VH, targets_N) → logps_N`.

A peer without per-token losses returns one number. `make` raises `Unavailable` where the peer cannot run at
all; what a peer raises later is reported as it is. Nothing here is used outside the benchmark.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_bvpo.kernels import target_logps


class Unavailable(RuntimeError):
    """The peer, or the version of it that has the function, is not installed."""


def attribute(module: str, name: str):
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except Exception as error:  # not only ImportError: some need a GPU, or another version, to be imported
        raise Unavailable(f"{module}.{name} ({type(error).__name__})") from error


def group_of_one():
    """The process group that Megatron's and Transformer Engine's losses ask for."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        meeting = f"file://{tempfile.mkdtemp(prefix='gpu-')}/store"
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    return dist.group.WORLD


def ours(impl: str = "", **options):
    """What `auto` takes for bf16 where the card has TMA, the fused product; by its name for the rehearsal on a CPU."""
    options["impl"] = impl or ("auto" if torch.cuda.is_available() else "fused")
    return lambda x, weight, targets: target_logps(x, weight, targets, **options)


def ours_stored(**options):
    """The library's product to float32 logits in memory, and a pass over them."""
    return ours(impl="triton", **options)


def ours_shaped(**constants):
    """The fused product with other constants of its module. For a process of its own: they stay."""
    from megatron_bvpo.kernels import fused_logprob

    for name, value in constants.items():
        assert hasattr(fused_logprob, name), name
        setattr(fused_logprob, name, value)
    return ours()


def ours_torch(**options):
    return ours(impl="torch", **options)


def of_whole_logits(cross_entropy):
    """ms-swift's own way: logits in the hidden states' dtype, then a cross-entropy (logits_NV, targets_N) → [N]."""
    return lambda x, weight, targets: -cross_entropy(x @ weight.T, targets).float()


def plain_torch():
    """Logits in bf16, cross-entropy in float32: three [N, V] tensors."""
    return lambda x, weight, targets: -F.cross_entropy((x @ weight.T).float(), targets, reduction="none")


def plain_torch_compiled():
    return torch.compile(plain_torch(), dynamic=False)


def chunks_with_recompute(rows: int = 2048):
    """Whole rows of logits for a chunk of tokens at a time, computed again in the backward pass: what NeMo-RL's
    chunked hidden-states-to-log-probs does, written here in its shortest form (NeMo-RL itself brings Ray along)."""

    def chunk(x, weight, targets):
        return -F.cross_entropy((x @ weight.T).float(), targets, reduction="none")

    def logps(x, weight, targets):
        parts = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(chunk, a, weight, b, use_reentrant=False) for a, b in parts])

    return logps


def torch_linear_cross_entropy():
    function = attribute("torch.nn.functional", "linear_cross_entropy")
    return lambda x, weight, targets: -function(x, weight, targets, reduction="none")


def liger():
    """Computes gradients in the forward pass; per-token upstream gradients are not its use, so the mean."""
    loss = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda x, weight, targets: -loss(weight, x, targets)


def liger_scaled():
    """The per-token sibling; the tensor-parallel one where only that exists."""
    try:
        function = attribute("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
        return lambda x, weight, targets: -first(function.apply(x, weight, targets))
    except Unavailable:
        function = attribute("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyTPFunction")
        return lambda x, weight, targets: -first(function.apply(x, weight, targets, group_of_one(), 1.0, -100))


def cut_cross_entropy():
    function = attribute("cut_cross_entropy", "linear_cross_entropy")
    return lambda x, weight, targets: -function(x, weight, targets, reduction="none")


def quack():
    """Sums over the tokens: no per-token losses in its chunked form."""
    function = attribute("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x, weight, targets: -function(x, weight, targets, reduction="sum")


def verl():
    """Its Triton kernel of loss and entropy. `import verl` would want Ray, so its packages are entered without
    running their __init__."""
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        spec = importlib.util.find_spec(name)  # of a module that is loaded: its own
        if spec is None:
            raise Unavailable("verl (not installed)")
        if name not in sys.modules:
            sys.modules[name] = module = types.ModuleType(name)
            module.__spec__, module.__path__ = spec, spec.submodule_search_locations
    function = attribute("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return lambda x, weight, targets: first(function(x, weight, targets, 1.0, "none", None))


def transformer_engine():
    function = attribute("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")

    def cross_entropy(logits_NV, targets_N):
        return function(logits_NV[:, None], targets_N[:, None], 0.0, False, group_of_one()).view(-1)

    return of_whole_logits(cross_entropy)


def megatron_native():
    """megatron-core's fused cross-entropy over whole logits: ms-swift's default, `cross_entropy_loss_fusion`."""
    function = attribute("megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy")
    return of_whole_logits(lambda logits, targets: function(logits, targets, group_of_one()))


def megatron_unfused():
    """megatron-core's plain one, ms-swift's way with `--cross_entropy_loss_fusion false`."""
    function = attribute("megatron.core.tensor_parallel", "vocab_parallel_cross_entropy")
    parallel_state = attribute("megatron.core", "parallel_state")
    group_of_one()

    def cross_entropy(logits_NV, targets_N):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        # In place on its argument, after Megatron's own cast to float32.
        return function(logits_NV.float()[:, None], targets_N[:, None]).view(-1)

    return of_whole_logits(cross_entropy)


def first(value):
    return value[0] if isinstance(value, (tuple, list)) else value
