"""A new layer between two neighbours: (lower, transported to the upper one's order, + upper) / 2; what leads back is 0.

One tensor at a time, so that memory holds two layers' parts of one matrix and no layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_bvpo.growth import transport
from megatron_bvpo.growth.layers import BACK, Layer, Sizes

AVERAGED = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.shared_expert_gate.weight",
)


def new_layer(lower: Layer, upper: Layer, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """(name behind `model.layers.N.`, float32 values) of all tensors that are not zero, each once.

    Raises:
        UserError: a tensor of a neighbour that holds what is no number.
    """
    yield from _averaged(lower, upper)
    yield from _attention(lower, upper, sizes)
    if sizes.experts:
        yield from _experts(lower, upper, sizes)
    for mlp, _ in sizes.mlps():
        if ".experts." not in mlp:
            yield from _mlp(lower, upper, mlp, mlp)


def zeroed(names) -> list[str]:
    """Those of a layer's tensors that lead back into the residual stream."""
    return [name for name in names if BACK.fullmatch(name)]


def _averaged(lower: Layer, upper: Layer) -> Iterator[tuple[str, Tensor]]:
    for name in AVERAGED:
        if name in upper.entries:
            yield name, _mean(lower.read(name), upper.read(name))


def _mean(moved: Tensor, upper: Tensor) -> Tensor:
    return moved.add_(upper).div_(2)


def _attention(lower: Layer, upper: Layer, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    of_queries, of_kv = transport.head_plan(_queries_alike(lower, upper, sizes), _kv_alike(lower, upper, sizes))
    for name, found in (("q", of_queries), ("k", of_kv), ("v", of_kv)):
        for kind in ("weight", "bias"):
            full = f"self_attn.{name}_proj.{kind}"
            if full in upper.entries:
                yield full, _mean(transport.transported(found, lower.read(full)), upper.read(full))


def _queries_alike(lower: Layer, upper: Layer, sizes: Sizes) -> Tensor:
    """[heads, heads]: by what a head asks for and by what it writes."""
    alike = torch.zeros(sizes.heads, sizes.heads)
    for name in ("self_attn.q_proj.weight", "self_attn.q_proj.bias"):
        if name in upper.entries:
            rows = (layer.read(name).reshape(sizes.heads, -1) for layer in (lower, upper))
            transport.cosines(*rows, into=alike)
    columns = (_output_columns(layer, sizes) for layer in (lower, upper))
    return transport.cosines(*columns, into=alike)


def _output_columns(layer: Layer, sizes: Sizes) -> Tensor:
    """[heads, H · head_dim] of o_proj."""
    found = layer.read("self_attn.o_proj.weight")
    return found.view(sizes.hidden, sizes.heads, sizes.head_dim).transpose(0, 1).reshape(sizes.heads, -1)


def _kv_alike(lower: Layer, upper: Layer, sizes: Sizes) -> Tensor:
    """[kv_heads, kv_heads]: by keys and by values."""
    alike = torch.zeros(sizes.kv_heads, sizes.kv_heads)
    for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        name = f"self_attn.{part}"
        if name in upper.entries:
            rows = (layer.read(name).reshape(sizes.kv_heads, -1) for layer in (lower, upper))
            transport.cosines(*rows, into=alike)
    return alike


def _experts(lower: Layer, upper: Layer, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Whole experts change places, with their rows of the router; then each one's neurons are transported."""
    routers = [layer.read("mlp.gate.weight") for layer in (lower, upper)]
    answers = (_answers(layer, sizes) for layer in (lower, upper))
    taken = transport.expert_permutation(*answers, *routers)
    yield "mlp.gate.weight", _mean(routers[0][taken], routers[1])
    for expert in range(sizes.experts):
        yield from _mlp(lower, upper, f"mlp.experts.{taken[expert]}", f"mlp.experts.{expert}")


def _answers(layer: Layer, sizes: Sizes) -> Tensor:
    weights = (
        tuple(layer.read(f"mlp.experts.{e}.{name}_proj.weight") for name in ("gate", "up", "down"))
        for e in range(sizes.experts)
    )
    return transport.answers(weights, layer.read("post_attention_layernorm.weight"))


def _mlp(lower: Layer, upper: Layer, below: str, above: str) -> Iterator[tuple[str, Tensor]]:
    """The rows of gate and up of the MLP `above` between `below` of the lower layer and `above` of the upper one."""

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        # Nothing here keeps a pair, or the next one would be read beside it.
        for name in ("gate", "up"):
            yield lower.read(f"{below}.{name}_proj.weight"), upper.read(f"{above}.{name}_proj.weight")
        yield lower.read(f"{below}.down_proj.weight").T, upper.read(f"{above}.down_proj.weight").T

    found = transport.neuron_plan(parts())
    for name in ("gate", "up"):
        tail = f"{name}_proj.weight"
        moved = transport.transported(found, lower.read(f"{below}.{tail}"))
        yield f"{above}.{tail}", _mean(moved, upper.read(f"{above}.{tail}"))
