"""Which parameters a rank holds, in the order in which Megatron's modules name them.

Sources: megatron-core 0.16.1 (transformer_block, attention, mlp, moe/experts, the TE wrappers), mcore-bridge 1.6
(model/gpt_model.py for the vocabulary's padding, tuners/lora.py for the adapters). With LoRA under tensor
parallelism a column-parallel layer's A is whole on every rank and its B is split; a row-parallel layer's A is split
and its B whole; an expert's factors are whole, one pair an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bvpo.errors import UserError
from megatron_bvpo.planning.model_shapes import ModelShape

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Tensor:
    """One parameter of one rank.

    Attributes:
        elements: on this rank.
        trained: it has a gradient.
        adapter: a LoRA factor.
        expert: reduced over the experts' data parallelism, in Megatron's second buffer.
        shared_embedding: a tied embedding of a pipeline, which gets a bucket of its own.
    """

    elements: int
    trained: bool
    adapter: bool = False
    expert: bool = False
    shared_embedding: bool = False


@dataclass(frozen=True)
class Split:
    """What decides the tensors of a model chunk.

    Attributes:
        tp, etp, ep: sizes of the groups that split matrices and experts.
        pipeline: whether the model is cut into stages.
        lora_rank: 0 for full tuning.
        lora_modules: names of the adapted linear layers, with `router`.
        reference_adapter: a second, frozen adapter is the reference.
        router_frozen: what is trained whole leaves its routers as they are.
    """

    tp: int
    etp: int
    ep: int
    pipeline: bool
    lora_rank: int
    lora_modules: tuple[str, ...]
    reference_adapter: bool = False
    router_frozen: bool = False


def lora_modules(target_modules: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the adapted layers; raises UserError for names that the plan does not know."""
    found: list[str] = []
    for name in target_modules:
        if name == "all-linear":
            found += LINEARS
        elif name in ("all-router", "router"):
            found.append("router")
        elif name in LINEARS:
            found.append(name)
        else:
            raise UserError(
                f"{name!r} is none of all-linear, all-router, {', '.join(LINEARS)}",
                field="target_modules",
                remedy="plan with all-linear, which is an upper bound",
            )
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=512)
def chunk_tensors(
    shape: ModelShape, split: Split, layers: int, first: bool, last: bool, trained: tuple[int, ...] | None = None
) -> tuple[Tensor, ...]:
    """Parameters of a model chunk with `layers` layers; `first` has the embedding, `last` the head.

    Args:
        trained: the layers of the chunk, from 0, that are trained whole: alone, or without adapters beside others that
            have some. None: what is trained is alike in all layers.
    """
    full = split.lora_rank == 0 and trained is None
    vocab_rows = -(-shape.vocab // split.tp)  # padded to a multiple of TP
    shared = shape.tied and split.pipeline
    tensors: list[Tensor] = []
    if first:
        tensors.append(Tensor(vocab_rows * shape.hidden, full, shared_embedding=shared))
    kept, moved = _layer(shape, split, full), _layer(shape, replace(split, lora_rank=0), True) if trained else []
    for i in range(layers):
        tensors += moved if trained and i in trained else kept
    if last:
        tensors.append(Tensor(shape.hidden, full))
        if not shape.tied or (shared and not first):
            tensors.append(Tensor(vocab_rows * shape.hidden, full, shared_embedding=shared))
    return tuple(tensors)


def _layer(shape: ModelShape, split: Split, full: bool) -> list[Tensor]:
    h, d, tp = shape.hidden, shape.head_dim, split.tp
    q, qkv = shape.heads * d, _qkv_rows(shape, tp)
    found = [Tensor(h * q // tp, full)]
    found += _factors("linear_proj", split, a=q // tp, b=h)
    found += [Tensor(h, full), Tensor(qkv * h, full)]  # the norm before the layer is fused into its first product
    if shape.qkv_bias:
        found.append(Tensor(qkv, full))
    found += _factors("linear_qkv", split, a=h, b=qkv)
    if shape.qk_norm:
        found += [Tensor(d, full), Tensor(d, full)]
    return found + (_experts(shape, split, full) if shape.experts else _mlp(shape, split, full))


def _qkv_rows(shape: ModelShape, tp: int) -> int:
    return (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tp


def _mlp(shape: ModelShape, split: Split, full: bool) -> list[Tensor]:
    h, f = shape.hidden, shape.ffn // split.tp
    return [
        Tensor(h, full),
        Tensor(2 * f * h, full),
        *_factors("linear_fc1", split, a=h, b=2 * f),
        Tensor(h * f, full),
        *_factors("linear_fc2", split, a=f, b=h),
    ]


def _experts(shape: ModelShape, split: Split, full: bool) -> list[Tensor]:
    h, f, n = shape.hidden, shape.ffn // split.etp, shape.experts // split.ep
    # host/parallel_attributes.py marks experts that TP ranks hold in copies, too.
    expert = split.ep > 1 or split.tp != split.etp
    return [
        Tensor(h, full),
        Tensor(shape.experts * h, full and not split.router_frozen),
        *_factors("router", split, a=h, b=shape.experts),
        *[Tensor(2 * f * h, full, expert=expert)] * n,
        *_factors("linear_fc1", split, a=h, b=2 * f, copies=n, expert=expert),
        *[Tensor(h * f, full, expert=expert)] * n,
        *_factors("linear_fc2", split, a=f, b=h, copies=n, expert=expert),
    ]


def _factors(name: str, split: Split, *, a: int, b: int, copies: int = 1, expert: bool = False) -> list[Tensor]:
    """A's then B's of one adapted layer: `a` and `b` elements a unit of rank."""
    if split.lora_rank == 0 or name not in split.lora_modules:
        return []
    r = split.lora_rank
    factors = [(r * a, True), (r * b, True)]
    if split.reference_adapter:
        factors = [(r * a, True), (r * a, False), (r * b, True), (r * b, False)]
    return [t for n, trained in factors for t in [Tensor(n, trained, adapter=True, expert=expert)] * copies]
