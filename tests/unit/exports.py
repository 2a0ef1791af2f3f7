"""A base model and checkpoints of it as files, small and random: attention, a layer of experts, one for MTP."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_bvpo.cli import bvpo

H, F, E, RANK, ALPHA = 24, 8, 3, 4, 6.0
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_experts": E,
    "vocab_size": 11,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}
Q, O_PROJ, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts"
MTP = ["model.layers.2.mlp.down_proj.weight", "model.mtp.norm.weight"]
PREFIX = "base_model.model."
SHAPES = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}


def base_tensors(dtype=torch.bfloat16, fused: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (11, H), "lm_head.weight": (11, H), "model.norm.weight": (H,)}
    shapes |= {f"{Q}.weight": (2 * H, H), f"{O_PROJ}.weight": (H, 2 * H), MTP[0]: (H, F), MTP[1]: (H,)}
    if fused:
        shapes |= {f"{EXPERTS}.gate_up_proj": (E, 2 * F, H), f"{EXPERTS}.down_proj": (E, H, F)}
    else:
        shapes |= {f"{EXPERTS}.{i}.{name}.weight": shape for i in range(E) for name, shape in SHAPES.items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """Two files and their index, the second with every other tensor; a tokenizer's file and sampling settings."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "generation_config.json").write_text('{"top_k": 20}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def adapter_tensors(paths: dict[str, tuple[int, int]], rank: int = RANK) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for path, (n_out, n_in) in paths.items():
        found[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
        found[f"base_model.model.{path}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator)
    return found


DENSE = {Q: (2 * H, H), O_PROJ: (H, 2 * H)}
MIXTURE = {f"{EXPERTS}.{i}.{name}": shape for i in range(E) for name, shape in SHAPES.items()}


def write_checkpoint(folder: Path, base: Path, tensors: dict[str, torch.Tensor] | None = None, **config) -> Path:
    """As a run of a mixture leaves it: the engine's form of the adapter in vllm/."""
    (folder / "vllm").mkdir(parents=True)
    tensors = adapter_tensors(DENSE | MIXTURE) if tensors is None else tensors
    save_file(tensors, folder / "vllm" / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "bias": "none", "target_modules": [], **config}
    (folder / "vllm" / "adapter_config.json").write_text(json.dumps(config))
    write_run_files(folder, base)
    return folder


def write_run_files(folder: Path, base: Path) -> None:
    (folder / "args.json").write_text(json.dumps({"model": "Maker/Model", "model_dir": str(base)}))
    identity = {"model_type": "qwen3_moe", "hidden_size": H, "num_hidden_layers": 2, "num_experts": E, "vocab_size": 11}
    (folder / "bvpo_state.json").write_text(json.dumps({"format": 1, "iteration": 7, "model": identity}))


def write_trained(folder: Path, base: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of a whole model, without the base's layers for MTP."""
    write_model(folder, tensors, {"dtype": "bfloat16", **CONFIG, "num_nextn_predict_layers": 0})
    write_run_files(folder, base)
    return folder


def export(*arguments) -> int:
    """`bvpo export` with these arguments: its exit code."""
    return bvpo(["export", *map(str, arguments)])


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the index names them."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
    found = {}
    for file in files or ["model.safetensors"]:
        found |= load_file(folder / file)
    return found
