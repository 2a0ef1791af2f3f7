"""An adapter as engines load it beside others: dense layers in peft's names, experts with a pair of factors each.

What vLLM 0.32 reads (lora/peft_helper.py, lora/lora_model.py, model_executor/layers/fused_moe): `r`, `lora_alpha`,
`use_rslora` and `target_modules` of adapter_config.json; `….experts.N.gate_proj` and the like for a model whose
experts are apart in its checkpoint, as Qwen3's are. It takes a part of a fused pair (q alone, gate alone) of dense
layers, but of experts all three projections of all of them, and ends the engine where one is missing. peft's form of
fused experts it refuses unless the server was started for it (--enable-mixed-moe-lora-format). A router's factors it
takes and does not apply (measured on Qwen3-MoE: the wrapped router is not the one that its expert runner calls).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_bvpo.errors import UserError
from megatron_bvpo.export.adapter import EXPERT, PREFIX, Adapter
from megatron_bvpo.export.tensor_files import TYPES
from megatron_bvpo.launching.adapter_folders import CONFIG, WEIGHTS

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROUTERS = ("gate", "router")


def write_engine_adapter(adapter: Adapter, out: Path, num_experts: int | None) -> list[str]:
    """Write the adapter to `out`, a new folder; returns what is to be told of it.

    Args:
        num_experts: of the model's layers, where it is known.

    Raises:
        UserError: modules saved whole, routers, experts that are not all there, or factors that are no numbers.
    """
    if adapter.whole:
        raise UserError(
            f"{next(iter(adapter.whole))} was trained whole (modules_to_save), and in an adapter "
            "engines have no place for that",
            file=str(adapter.file),
            remedy="use --merge",
        )
    _refuse_routers(adapter)
    trained = sum(bool(adapter.delta(path)[1].any()) for path in adapter.factors)
    added = _absent_projections(adapter, num_experts)
    if added:
        with safe_open(str(adapter.file), framework="pt") as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()} | added  # noqa: SIM118
        save_file(tensors, str(out / WEIGHTS), metadata={"format": "pt"})
    else:
        shutil.copyfile(adapter.file, out / WEIGHTS)
    paths = [*adapter.factors, *(name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in added)]
    config = adapter.config | {
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
        "inference_mode": True,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    told = [f"{len(paths)} layers and experts have factors of rank {adapter.rank}, scale {adapter.scale:.6g}"]
    if not trained:
        told.append("note: every B is zero, so that this adapter changes nothing: was anything trained?")
    if added:
        told.append(f"{len(added) // 2} untrained projections of experts got factors of zeros: vLLM wants all three")
    return told


def _refuse_routers(adapter: Adapter) -> None:
    """An engine that leaves a part of the adapter out answers as no model that was trained."""
    for path in adapter.factors:
        if path.rpartition(".")[2] in ROUTERS:
            raise UserError(
                f"{path} is a router, and vLLM would leave its factors out without a word",
                file=str(adapter.file),
                remedy="use --merge, or train without all-router",
            )


def _absent_projections(adapter: Adapter, num_experts: int | None) -> dict[str, Tensor]:
    """Factors of zeros for the projections of adapted experts that were not trained, by their names in the file."""
    zeros: dict[str, Tensor] = {}
    for experts, found in adapter.experts().items():
        n = num_experts or max(found) + 1
        if set(found) != set(range(n)):
            raise UserError(
                f"{experts} has {n} experts, and {len(found)} of them have factors",
                file=str(adapter.file),
                remedy="take another checkpoint",
            )
        kinds = set().union(*found.values())
        if kinds - set(PROJECTIONS) or any(projections != kinds for projections in found.values()):
            raise UserError(
                f"{experts} has factors of {', '.join(sorted(kinds))}; expected {', '.join(PROJECTIONS)} of each",
                file=str(adapter.file),
                remedy="use --merge, or have the run write the merged model (--merge_lora true)",
            )
        absent = [projection for projection in PROJECTIONS if projection not in kinds]
        for i in range(n if absent else 0):
            n_in, n_out, dtype = _sizes(adapter, experts, i)
            for projection in absent:
                wide, narrow = (n_out, n_in) if projection == "down_proj" else (n_in, n_out)
                name = f"{PREFIX}{experts}.{i}.{projection}"
                zeros[f"{name}.lora_A.weight"] = torch.zeros(adapter.rank, wide, dtype=dtype)
                zeros[f"{name}.lora_B.weight"] = torch.zeros(narrow, adapter.rank, dtype=dtype)
    return zeros


def _sizes(adapter: Adapter, experts: str, index: int) -> tuple[int, int, torch.dtype]:
    """(hidden size, an expert's own size, type of the factors), from a projection that has some."""
    for projection in PROJECTIONS:
        pair = adapter.factors.get(f"{experts}.{index}.{projection}")
        if pair is not None:
            (a, b), down = pair, projection == "down_proj"
            hidden, own = (b.shape[0], a.shape[1]) if down else (a.shape[1], b.shape[0])
            return hidden, own, TYPES[a.dtype]
    raise AssertionError(f"{experts}.{index} has no factors; EXPERT is {EXPERT.pattern}")
