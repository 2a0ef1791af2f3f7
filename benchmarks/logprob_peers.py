"""Other people's target log-probs, each behind `make(**options) → f(x_NH, weight_VH, targets_N) → logps_N`.

A peer without per-token losses returns one number. `make` raises `Unavailable` where the peer cannot run at
all; what a peer raises later is reported as it is. Nothing here is used outside the benchmark.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F

from megatron_bvpo.kernels import target_logps


class Unavailable(RuntimeError):
    """The peer, or the version of it that has the function, is not installed."""


def attribute(module: str, name: str):
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except Exception as error:  # not only ImportError: some need a GPU, or another version, to be imported
        raise Unavailable(f"{module}.{name} ({type(error).__name__})") from error


def ours(**options):
    return lambda x, weight, targets: target_logps(x, weight, targets, **options)


def ours_torch(**options):
    return ours(impl="torch", **options)


def plain_torch():
    """Logits in bf16, cross-entropy in float32: three [N, V] tensors."""
    return lambda x, weight, targets: -F.cross_entropy((x @ weight.T).float(), targets, reduction="none")


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
        return lambda x, weight, targets: -first(function.apply(x, weight, targets, dist.group.WORLD, 1.0, -100))


def cut_cross_entropy():
    function = attribute("cut_cross_entropy", "linear_cross_entropy")
    return lambda x, weight, targets: -function(x, weight, targets, reduction="none")


def quack():
    """Sums over the tokens: no per-token losses in its chunked form."""
    function = attribute("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda x, weight, targets: -function(x, weight, targets, reduction="sum")


def transformer_engine():
    function = attribute("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")

    def cross_entropy(logits_NV, targets_N):
        return function(logits_NV[:, None], targets_N[:, None], 0.0, False, dist.group.WORLD).view(-1)

    return ours(impl="te", cross_entropy=cross_entropy)


def megatron_native():
    """megatron-core's fused cross-entropy over whole logits: ms-swift's default, `cross_entropy_loss_fusion`."""
    function = attribute("megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy")
    return ours(impl="te", cross_entropy=lambda logits, targets: function(logits, targets, dist.group.WORLD))


def megatron_unfused():
    """megatron-core's plain one, ms-swift's way with `--cross_entropy_loss_fusion false`."""
    function = attribute("megatron.core.tensor_parallel", "vocab_parallel_cross_entropy")
    parallel_state = attribute("megatron.core", "parallel_state")

    def cross_entropy(logits_NV, targets_N):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        # In place on its argument, after Megatron's own cast to float32.
        return function(logits_NV.float()[:, None], targets_N[:, None]).view(-1)

    return ours(impl="te", cross_entropy=cross_entropy)


def first(value):
    return value[0] if isinstance(value, (tuple, list)) else value


PEERS = {
    "ours": ours,
    "ours, torch": ours_torch,
    "plain torch": plain_torch,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "Liger fused linear CE": liger,
    "Liger scaled": liger_scaled,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
    "Transformer Engine": transformer_engine,
    "Megatron fused (ms-swift default)": megatron_native,
    "Megatron unfused (ms-swift)": megatron_unfused,
}
