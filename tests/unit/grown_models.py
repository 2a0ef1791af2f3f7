"""Tiny models of every kind that can be grown, with their logits; and layers of which one is another in disorder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megatron_bvpo.cli import bvpo
from megatron_bvpo.growth.layers import Sizes

KINDS = ("qwen3", "qwen3-tied", "qwen2", "qwen3_moe", "qwen2_moe")
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    initializer_range=0.2,
)
MIXTURE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16)


def make_model(folder: Path, kind: str, dtype=torch.float32, **sizes) -> Path:
    """A model of random weights, biases and norms, in two files with an index."""
    import transformers

    more: dict = dict(tie_word_embeddings=kind.endswith("-tied"))
    name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe"}[kind.split("-")[0]]
    if name.startswith("Qwen3"):
        more["head_dim"] = 8
    else:
        more |= dict(num_attention_heads=4)
    if name.endswith("Moe"):
        more |= MIXTURE
    if kind == "qwen2_moe":
        more["shared_expert_intermediate_size"] = 24
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():  # norms of ones and biases of zero would hide what is done with them
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.to(dtype).save_pretrained(folder, max_shard_size=size // 2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def expand(model: Path, out: Path, layers: str = "upper-half", *more) -> int:
    return bvpo(["expand", str(model), str(out), "--layers", layers, *map(str, more)])


def logits(folder: Path, dtype=torch.float32) -> torch.Tensor:
    """Of two fixed texts; every tensor of the files has its place, and no place is left empty."""
    import transformers

    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(told.values()), told
    words = model.config.vocab_size
    ids = torch.randint(words, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits


def copy_of(model: Path, target: Path, **config) -> Path:
    """A copy with other keys in its config.json; None takes one away."""
    shutil.copytree(model, target)
    found = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return target


def in_disorder(layer: dict[str, torch.Tensor], sizes: Sizes, seed: int, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """The same layer with its heads, neurons and experts in another order, and noise of a share of each tensor's size.

    A key-value head goes with its query heads, which change places within their group: what the layer computes is the
    same, but for the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def order(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator)

    found = dict(layer)
    per_group = sizes.heads // sizes.kv_heads
    groups = order(sizes.kv_heads)
    queries = torch.cat([group * per_group + order(per_group) for group in groups])
    for name, heads in (("q", queries), ("k", groups), ("v", groups)):
        for tail in ("weight", "bias"):
            full = f"self_attn.{name}_proj.{tail}"
            if full in layer:
                found[full] = layer[full].unflatten(0, (-1, sizes.head_dim))[heads].flatten(0, 1)
    out = layer["self_attn.o_proj.weight"]
    found["self_attn.o_proj.weight"] = out.unflatten(1, (-1, sizes.head_dim))[:, queries].flatten(1, 2)
    experts = order(sizes.experts) if sizes.experts else None
    if experts is not None:
        found["mlp.gate.weight"] = layer["mlp.gate.weight"][experts]
    for mlp, n in sizes.mlps():
        head, _, number = mlp.rpartition(".experts.")
        source = f"{head}.experts.{experts[int(number)]}" if head else mlp
        neurons = order(n)
        for name in ("gate", "up"):
            found[f"{mlp}.{name}_proj.weight"] = layer[f"{source}.{name}_proj.weight"][neurons]
        found[f"{mlp}.down_proj.weight"] = layer[f"{source}.down_proj.weight"][:, neurons]
    return {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if noise
        else tensor.clone()
        for name, tensor in found.items()
    }
