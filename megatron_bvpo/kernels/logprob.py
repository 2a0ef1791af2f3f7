"""`target_logps`: log-probabilities of target tokens from hidden states and the head's weight.

The public face: validates, agrees with the other tensor-parallel ranks, picks a path and its tile sizes.
The passes are in `torch_logprob.py` and `triton_logprob.py`, forward and backward in `autograd.py`.

Shapes: N tokens of the sequence, L tokens of this rank (N, or N / ranks under sequence parallelism), H
hidden size, V this rank's vocabulary rows, padding included.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_bvpo.kernels import torch_logprob
from megatron_bvpo.kernels.autograd import Plan, TargetLogps
from megatron_bvpo.kernels.tensor_parallel import TensorParallel
from megatron_bvpo.kernels.tile_sizes import choose_tiles

IMPLS = ("auto", "torch", "triton", "fused")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler, and Triton with it, right away
def target_logps(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    impl: str = "auto",
    vocab_size: int | None = None,
    ignore_index: int = -100,
    block_tokens: int | None = None,
    tile_vocab: int | None = None,
    budget_bytes: int | None = None,
    shard: Shard | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden · weightᵀ / temperature)[target] of every token, without the [N, V] logits.

    Differentiable once in `hidden_NH`, and in `weight_VH` if it requires a gradient, for any upstream
    gradient per token. No grad: one product; frozen head: two, all in the forward pass, which keeps dlogp/dx
    in place of the hidden states; trainable head: one forward and three backward.

    Args:
        hidden_NH: [N, H] hidden states after the final norm, what the output layer would be given. Under
            `sequence_parallel` [L, H], this rank's chunk of the sequence, chunks in rank order.
        weight_VH: [V, H] the head's weight, or this rank's rows of it, dtype and device of `hidden_NH`. Ranks
            hold contiguous shards in rank order; sizes may differ.
        targets_N: [N] int64 or int32 vocabulary ids for **all** tokens, the same on every rank;
            `ignore_index` marks tokens that cost nothing, have logp 0 and gradient 0.
        tp_group: the tensor-parallel group over which the vocabulary is sharded; None for a whole head.
        sequence_parallel: hidden states arrive as chunks and their gradient leaves as chunks.
        impl: "torch" (any device), "triton" (CUDA: the library's product, then one pass over float32 logits),
            "fused" (Hopper: exponentials in the product's epilogue), or "auto": on CUDA fused for bf16
            where it can run, else triton where that can, else torch.
        vocab_size: how many vocabulary rows are real, counted over all ranks; the rest is padding and takes
            no part. Default: all.
        block_tokens, tile_vocab: tokens and vocabulary rows per logits tile. Default: from `budget_bytes` on a
            GPU, from the cache size of a CPU. They change speed and memory, and results only in the last bits.
        budget_bytes: on a GPU, what a tile of logits may take (default 1 GiB, whatever is free: two runs are
            bit-identical).
        shard: what `vocabulary_shard` returned for this weight: sizes are not gathered again.
        temperature: what the logits are divided by, .001 to 1000.
        return_entropy: the entropy of each token's distribution too, of the same pass over the logits.

    Returns:
        logps_N: [N] float32 (float64 for float64 inputs), whole and identical on every rank. With `return_entropy`
        (logps_N, entropies_N): nats, [N] like logps_N, 0 for ignored tokens; it has no gradient.

    Tensor parallelism, against Megatron's `ColumnParallelLinear`: this function stands in place of that layer
    and of the vocabulary-parallel cross-entropy behind it, and does both of their reductions. The upstream
    gradient must be the same on all ranks, as it is behind `vocab_parallel_cross_entropy`; it is neither
    divided nor summed. The gradient of the hidden states comes out summed over the ranks (what
    `allreduce_dgrad` does) or, under `sequence_parallel`, reduce-scattered (what that layer's backward does),
    so hidden states must come as the layer's own input does: not through
    `copy_to_tensor_model_parallel_region`, and not gathered from the sequence-parallel region.

    Raises:
        TypeError: something that is no plain tensor (a head with LoRA is refused), or an unsupported dtype.
        ValueError: shapes, dtypes, devices or target ids that do not fit; shards that do not hold
            `vocab_size` rows; an `impl` that cannot run here.
        RuntimeError: a backward pass with create_graph=True.

    Source: MATH.md §4.
    """
    check_tensors(hidden_NH, weight_VH, targets_N)
    if not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"target_logps: temperature is {temperature}, expected a number from .001 to 1000")
    hidden_NH, weight_VH = cast_as_linear_would(hidden_NH, weight_VH)
    check_products(hidden_NH)
    tp = TensorParallel(tp_group, sequence_parallel)
    check_shapes(hidden_NH, weight_VH, targets_N, tp)
    shard = check_shard(shard, weight_VH, vocab_size, tp) or find_shard(weight_VH, targets_N, vocab_size, tp)
    check_targets(targets_N, shard.vocab_size, ignore_index)
    passes = choose_passes(impl, hidden_NH, weight_VH)
    if not torch.is_grad_enabled():  # autograd.Function would still see requires_grad, and compute gradients
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
    frozen = hidden_NH.requires_grad and not weight_VH.requires_grad
    sizes = choose_tiles(
        hidden_NH.device,
        targets_N.shape[0],
        shard.rows,
        with_products=frozen,
        fused=passes.__name__.endswith("fused_logprob"),
        block_tokens=block_tokens,
        tile_vocab=tile_vocab,
        budget_bytes=budget_bytes,
    )
    plan = Plan(
        passes=passes,
        tp=tp,
        first_row=shard.first_row,
        rows=shard.rows,
        ignore_index=ignore_index,
        temperature=float(temperature),
        entropy=return_entropy,
        **sizes,
    )
    logps_N, entropies_N = TargetLogps.apply(hidden_NH, weight_VH, targets_N, plan)
    return (logps_N, entropies_N) if return_entropy else logps_N


class Shard(NamedTuple):
    """This rank's part of the vocabulary, and what all ranks hold together; from `vocabulary_shard`."""

    first_row: int  # vocabulary id of weight_VH[0]
    rows: int  # rows of weight_VH that are no padding
    sizes: list[int]  # rows with padding, of every rank
    vocab_size: int


def check_tensors(hidden_NH, weight_VH, targets_N) -> None:
    for name, value in (("hidden_NH", hidden_NH), ("weight_VH", weight_VH), ("targets_N", targets_N)):
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            continue
        message = f"target_logps: {name} must be a plain torch.Tensor, got {type(value).__name__}."
        if name == "weight_VH":
            message += (
                " A head with LoRA, or a quantised or sharded one, is refused: logits are hidden · weightᵀ"
                " here, so the adapter would be left out of the logps and get no gradient. Take output_layer"
                " (lm_head) out of the LoRA target modules, or merge the adapter, and pass its weight."
            )
        raise TypeError(message)
    for name, value in (("hidden_NH", hidden_NH), ("weight_VH", weight_VH)):
        if value.dtype not in DTYPES:
            raise TypeError(f"target_logps: {name} is {value.dtype}, expected one of {DTYPES}")
    if targets_N.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target_logps: targets_N is {targets_N.dtype}, expected torch.int64 or torch.int32")


def check_products(hidden_NH) -> None:
    """Of the factors as they are multiplied: what a GPU's library can do with them."""
    if hidden_NH.is_cuda and hidden_NH.dtype == torch.bfloat16 and TORCH < (2, 8):
        raise RuntimeError(
            f"target_logps: bf16 on a GPU needs torch 2.8 or newer, for products with float32 results; this is torch "
            f"{torch.__version__}. Update torch, or pass float32 tensors"
        )
    if hidden_NH.is_cuda and hidden_NH.dtype == torch.float16:
        warnings.warn(
            "target_logps: float16 cannot hold exp(logit - anchor), so tiles are widened to float32: about twelve "
            "times slower than bfloat16. Cast hidden states and head to bfloat16",
            stacklevel=3,
        )


def cast_as_linear_would(hidden_NH, weight_VH):
    """Under autocast both factors in its dtype, as torch.nn.functional.linear takes them; else unchanged."""
    device = hidden_NH.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (hidden_NH.dtype, weight_VH.dtype):
        return hidden_NH, weight_VH
    dtype = torch.get_autocast_dtype(device)
    return hidden_NH.to(dtype), weight_VH.to(dtype)


def check_shapes(hidden_NH, weight_VH, targets_N, tp: TensorParallel) -> None:
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or targets_N.dim() != 1:
        raise ValueError(
            "target_logps: expected hidden_NH [N, H], weight_VH [V, H] and targets_N [N], got "
            f"{tuple(hidden_NH.shape)}, {tuple(weight_VH.shape)} and {tuple(targets_N.shape)}; flatten the "
            "sequence and batch dimensions first"
        )
    if hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"target_logps: hidden_NH has hidden size {hidden_NH.shape[1]} and weight_VH {weight_VH.shape[1]}"
        )
    chunks = tp.size if tp.sequence_parallel else 1
    if hidden_NH.shape[0] * chunks != targets_N.shape[0]:
        raise ValueError(
            f"target_logps: {targets_N.shape[0]} targets for {hidden_NH.shape[0]} hidden states on each of "
            f"{chunks} sequence-parallel ranks, expected {hidden_NH.shape[0] * chunks}; targets_N covers the "
            "whole sequence on every rank"
        )
    if hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(f"target_logps: hidden_NH is {hidden_NH.dtype} and weight_VH {weight_VH.dtype}; cast one")
    if not hidden_NH.device == weight_VH.device == targets_N.device:
        raise ValueError(
            f"target_logps: hidden_NH is on {hidden_NH.device}, weight_VH on {weight_VH.device} and "
            f"targets_N on {targets_N.device}; move them to one device"
        )


def vocabulary_shard(
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Shard:
    """The shards as the ranks report them, for calls of `target_logps` with this weight that need not ask again.

    One small all-gather over `tp_group`; arguments and errors are those of `target_logps`.
    """
    return find_shard(weight_VH, targets_N, vocab_size, TensorParallel(tp_group, False))


def check_shard(shard: Shard | None, weight_VH, vocab_size: int | None, tp: TensorParallel) -> Shard | None:
    """`shard`, which must be of this weight and group: nobody would see otherwise that rows are left out."""
    if shard is None:
        return None
    expected = [weight_VH.shape[0], tp.size, vocab_size or shard.vocab_size]
    found = [shard.sizes[tp.rank] if tp.rank < len(shard.sizes) else None, len(shard.sizes), shard.vocab_size]
    if found != expected:
        raise ValueError(
            f"target_logps: shard is of {found[0]} rows, {found[1]} ranks and {found[2]} words, but this call has "
            f"{expected[0]}, {expected[1]} and {expected[2]}; take a new one from vocabulary_shard"
        )
    return shard


def find_shard(weight_VH, targets_N, vocab_size: int | None, tp: TensorParallel) -> Shard:
    everyone = tp.gather_ints([weight_VH.shape[0], targets_N.shape[0]], weight_VH.device)
    sizes = [rows for rows, _ in everyone]
    tokens = [count for _, count in everyone]
    if len(set(tokens)) > 1:
        raise ValueError(f"target_logps: the tensor-parallel ranks hold different numbers of targets: {tokens}")
    if vocab_size is None:
        vocab_size = sum(sizes)
    if not 0 < vocab_size <= sum(sizes):
        raise ValueError(
            f"target_logps: vocab_size is {vocab_size}, expected 1 to the weight's {sum(sizes)} rows (shards {sizes})"
        )
    first_row = sum(sizes[: tp.rank])
    return Shard(first_row, min(max(vocab_size - first_row, 0), sizes[tp.rank]), sizes, vocab_size)


def check_targets(targets_N, vocab_size: int, ignore_index: int) -> None:
    """Waits for the device, which the search for ignored tokens does anyway."""
    if targets_N.numel() == 0:
        return
    inside_N = targets_N.masked_fill(targets_N == ignore_index, 0)
    low, high = torch.stack(inside_N.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"target_logps: targets range from {low} to {high}, expected 0 to {vocab_size - 1} or "
            f"ignore_index ({ignore_index})"
        )


def choose_passes(impl: str, hidden_NH, weight_VH) -> ModuleType:
    """The module that runs the tiles: what was asked for, or the fastest that can take these tensors."""
    if impl not in IMPLS:
        raise ValueError(f"target_logps: impl {impl!r}, expected one of {IMPLS}")
    if impl == "torch" or (impl == "auto" and not hidden_NH.is_cuda):
        return torch_logprob
    for name in ("fused", "triton") if impl == "auto" else (impl,):
        obstacle = triton_obstacle(hidden_NH) or (name == "fused" and fused_obstacle(impl, hidden_NH, weight_VH))
        if not obstacle:
            return importlib.import_module(f"megatron_bvpo.kernels.{name}_logprob")
    if impl == "auto":
        return torch_logprob
    raise ValueError(f"target_logps: impl {impl!r} cannot run here: {obstacle}; use 'auto' or 'torch'")


def triton_obstacle(hidden_NH) -> str | None:
    """Why the Triton paths cannot take these hidden states, or None."""
    if hidden_NH.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes torch.float32 and torch.bfloat16, not {hidden_NH.dtype}"
    if not hidden_NH.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden_NH is on {hidden_NH.device}, and TRITON_INTERPRET=1 is not set"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def fused_obstacle(impl: str, hidden_NH, weight_VH) -> str | None:
    """Why the fused path cannot, or should not (impl "auto"), take these tensors; None where it can."""
    if impl == "auto" and hidden_NH.dtype != torch.bfloat16:
        return "float32 products are the library's to make"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "it needs Triton 3.4 or newer, for its tensor descriptors"
    from megatron_bvpo.kernels import fused_logprob

    return fused_logprob.obstacle(hidden_NH, weight_VH)
