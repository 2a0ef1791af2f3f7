"""The layers of a model as tables of tensors, and which of these lead back into the residual stream."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.tensor_files import TYPES, Entry, ModelFiles, read_rows
from megatron_bvpo.growth.grown_config import FIELD

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# The last products of attention, of an MLP, of every expert and of a shared expert: with these at zero a layer adds
# nothing. A mixture whose experts kept theirs was not the old model.
BACK = re.compile(r"(.*\.)?(o_proj|down_proj)\.(weight|bias)")


@dataclass(frozen=True)
class Sizes:
    """What decides a layer's tensors.

    Attributes:
        hidden: H, the width of the residual stream.
        heads, kv_heads, head_dim: of attention.
        ffn: neurons of a dense MLP, or of one expert.
        experts: E; 0 for a dense MLP.
        shared: neurons of a shared expert; 0 for none.
        qkv_bias, o_bias, qk_norm: whether there are such.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int
    shared: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name behind `model.layers.N.` → shape, of all tensors of a layer."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            found[f"self_attn.{name}_proj.weight"] = (rows, h)
            if self.qkv_bias:
                found[f"self_attn.{name}_proj.bias"] = (rows,)
        found["self_attn.o_proj.weight"] = (h, q)
        if self.o_bias:
            found["self_attn.o_proj.bias"] = (h,)
        if self.qk_norm:
            found |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        if self.experts:
            found["mlp.gate.weight"] = (self.experts, h)
        for mlp, neurons in self.mlps():
            found |= {f"{mlp}.gate_proj.weight": (neurons, h), f"{mlp}.up_proj.weight": (neurons, h)}
            found[f"{mlp}.down_proj.weight"] = (h, neurons)
        if self.shared:
            found["mlp.shared_expert_gate.weight"] = (1, h)
        return found

    def mlps(self) -> list[tuple[str, int]]:
        """(name, neurons) of the dense MLP, or of every expert and the shared one."""
        if not self.experts:
            return [("mlp", self.ffn)]
        experts = [(f"mlp.experts.{e}", self.ffn) for e in range(self.experts)]
        return experts + ([("mlp.shared_expert", self.shared)] if self.shared else [])


def sizes_of(config: dict[str, Any], file: str) -> Sizes:
    """From a config.json; raises UserError for a size that is missing or no size."""

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"is {value!r}; expected a whole number above 0", file=file, field=key, remedy="copy the model again"
            )
        return value

    kind = config["model_type"]
    mixture = kind in ("qwen3_moe", "qwen2_moe")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        message = f"{heads} heads cannot share {kv_heads}"
        raise UserError(message, file=file, field="num_key_value_heads", remedy="copy the model again")
    experts = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    biased = bool(config.get("attention_bias"))
    return Sizes(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", max(hidden // heads, 1)),
        ffn=size("moe_intermediate_size" if mixture else "intermediate_size"),
        experts=size(experts) if mixture else 0,
        shared=size("shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
        qkv_bias=bool(config.get("qkv_bias", True)) if kind.startswith("qwen2") else biased,
        o_bias=biased and kind.startswith("qwen3"),
        qk_norm=kind.startswith("qwen3"),
    )


class Layer:
    """One layer of a model: its tensors by their names behind `model.layers.N.`."""

    def __init__(self, number: int, entries: dict[str, Entry]):
        self.number, self.entries = number, entries

    def read(self, name: str) -> Tensor:
        """A tensor in float32, in memory of its own. Raises UserError where it holds what is no number."""
        entry = self.entries[name]
        found = read_rows(entry, 0, entry.rows).reshape(entry.shape).float()
        if not torch.isfinite(found.sum()):  # a sum, since a mask would take a quarter of the tensor again
            raise UserError(
                f"model.layers.{self.number}.{name} holds what is no number, or numbers too large to add",
                file=str(entry.file),
                field=FIELD,
                remedy="take an earlier checkpoint",
            )
        return found


def layers_of(model: ModelFiles, sizes: Sizes, count: int) -> list[Layer]:
    """The layers of a model in their order.

    Raises:
        UserError: a layer too few or too many, a tensor that is missing, unknown, of another shape than config.json
            says, or of another type than the layer's others.
    """
    found: dict[int, dict[str, Entry]] = defaultdict(dict)
    for name, entry in model.entries.items():
        if match := LAYER.fullmatch(name):
            found[int(match[1])][match[2]] = entry
    config = str(model.folder / "config.json")
    odd = next((n for n in range(count) if n not in found), None)
    if odd is not None or len(found) != count:
        odd = min(n for n in found if n >= count) if odd is None else odd
        raise UserError(
            f"says {count} layers, and the files {'hold' if odd in found else 'lack'} layer {odd}",
            file=config,
            field="num_hidden_layers",
            remedy="copy the model again",
        )
    expected = sizes.shapes()
    for number in range(count):
        _require_tensors(number, found[number], expected, model)
    return [Layer(number, found[number]) for number in range(count)]


def _require_tensors(number: int, there: dict[str, Entry], expected: dict[str, tuple], model: ModelFiles) -> None:
    def refuse(message: str, file: object, remedy: str) -> UserError:
        return UserError(message, file=str(file), field=FIELD, remedy=remedy)

    for name, shape in expected.items():
        full = f"model.layers.{number}.{name}"
        if name not in there:
            raise refuse(f"{full} is missing", model.folder, "copy the model again")
        entry = there[name]
        if entry.shape != shape:
            what = f"{full} is {list(entry.shape)}, and config.json says {list(shape)}"
            raise refuse(what, entry.file, "copy the model and its config.json again")
        if entry.dtype not in TYPES:
            raise refuse(f"{full} is {entry.dtype}", entry.file, "give the same model in bfloat16")
        first = next(iter(there.values()))
        if entry.dtype != first.dtype:
            what = f"{full} is {entry.dtype}, and others of its layer are {first.dtype}"
            raise refuse(what, entry.file, "save the model in one type first")
    for name in there:
        if name not in expected:
            raise refuse(
                f"model.layers.{number}.{name} is not known, so that it may lead back into the residual stream",
                there[name].file,
                "grow a model of transformers' own form",
            )
