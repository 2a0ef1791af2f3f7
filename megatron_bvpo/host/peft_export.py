"""The two forms of a saved MoE adapter, each in a folder where its reader finds it or fails.

mcore-bridge saves one pair of LoRA factors for each expert and projection (`…experts.0.gate_proj.lora_A`),
which vLLM and the Megatron backend read. transformers 5 holds the experts of a layer as two parameters, `gate_up_proj`
and `down_proj`, so peft below 0.19 finds no module of those names and drops the factors without a word (later ones fuse
them, and scale them otherwise under rsLoRA); and the router is no `nn.Linear` any more, which peft refuses. What peft
can do is target parameters. So the checkpoint itself gets the same numbers in peft's form (peft and `swift infer` read
it; vLLM refuses its names), and mcore-bridge's files move below it, to `vllm/`. In three steps:

1. Build the Hugging Face model on the meta device, and see which of the adapter's modules it has.
2. Let peft itself inject an adapter of the new form there: that gives every name and shape it will look for.
3. Fill these from the saved factors, and write only if nothing is missing or left over. Else the checkpoint
   has no adapter but the one in `vllm/`: peft then stops, where it would have loaded a part.

Shapes: E experts, R rank, I input and O output features of a projection.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from swift.utils import get_logger
from torch import Tensor, nn

from megatron_bvpo.launching.adapter_folders import CONFIG, PER_EXPERT, WEIGHTS

logger = get_logger()

_VERSIONS = f"peft {peft.__version__} with transformers {transformers.__version__}"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.lora_(?P<side>[AB])\.weight")
_ROUTER = re.compile(r"\.(gate|router)\.lora_[AB]\.weight$")
# The projections that each fused parameter holds, in the order of its output features.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class NotExportable(Exception):
    """The reason why there is no peft form of this adapter."""


def settle_adapter_forms(checkpoint: Path, hf_config: Any) -> None:
    """Put peft's form of a saved adapter into `checkpoint`, and mcore-bridge's into `checkpoint/vllm`.

    Nothing moves where both are the same, as for a dense model. Logs what each folder is for. One rank calls this.

    Args:
        checkpoint: a folder with `adapter_config.json` and `adapter_model.safetensors`; without them (full
            tuning, or no safetensors asked for) nothing happens.
        hf_config: the model's Hugging Face config.
    """
    weights = checkpoint / WEIGHTS
    if not weights.is_file():
        return
    alike = "The saved adapter is for peft, swift and vLLM alike"
    with safe_open(str(weights), framework="pt") as saved:
        names = set(saved.keys())
        if not any(_EXPERT.fullmatch(name) or _ROUTER.search(name) for name in names):
            logger.info(f"{alike}.")
            return
        try:
            form = _peft_form(checkpoint, hf_config, saved, names)
        except Exception as e:  # an extra must never cost the checkpoint, whatever an unknown model raises
            reason = str(e) if isinstance(e, NotExportable) else f"{type(e).__name__}: {e}"
            _move_to_per_expert(checkpoint)
            logger.warning(
                f"The saved adapter has no form for {_VERSIONS}: {reason}. {checkpoint.name}/{PER_EXPERT} holds it "
                "for vLLM and for --adapters of a Megatron run; peft would load a part of it, so it is not where "
                "peft looks. The merged model (--merge_lora true) is for all of them."
            )
            return
    if form is None:
        logger.info(f"{alike}: this transformers keeps experts apart.")
        return
    config, tensors = form
    _move_to_per_expert(checkpoint)
    config.save_pretrained(str(checkpoint))
    save_file(tensors, str(weights), metadata={"format": "pt"})
    logger.info(
        f"The saved adapter {checkpoint.name} is for {_VERSIONS}, whose experts are fused; the same numbers, one pair "
        f"of factors for each expert, are in {checkpoint.name}/{PER_EXPERT}: for vLLM and for --adapters of a Megatron "
        "run."
    )


def _move_to_per_expert(checkpoint: Path) -> None:
    folder = checkpoint / PER_EXPERT
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (checkpoint / name).rename(folder / name)
    if (checkpoint / "args.json").is_file():  # ms-swift takes the model and the template from it
        shutil.copy(checkpoint / "args.json", folder)


def _peft_form(checkpoint: Path, hf_config: Any, saved, names: set[str]) -> tuple[LoraConfig, dict[str, Tensor]] | None:
    """peft's config and tensors; None where the saved ones load as they are. Raises NotExportable."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, trust_remote_code=True)
    modules, parameters = _targets(model, names)
    if not parameters:
        return None

    config = LoraConfig.from_pretrained(str(checkpoint))
    if config.use_dora or config.lora_bias:
        raise NotExportable("peft has no DoRA and no LoRA bias for parameters")
    config.target_modules, config.target_parameters = sorted(modules), sorted(parameters)
    config.lora_dropout = 0.0  # peft has none for parameters, and a saved adapter is there to be used
    injected = get_peft_model(model, deepcopy(config), low_cpu_mem_usage=True)
    wanted = get_peft_model_state_dict(injected, save_embedding_layers=False)

    tensors, used = _fused_factors(injected, saved, names)
    tensors |= {name: saved.get_tensor(name) for name in names - used}
    _require_same(tensors, wanted)
    return config, tensors


def _targets(model: nn.Module, names: set[str]) -> tuple[set[str], set[str]]:
    """(`target_modules`, `target_parameters`) that reach every factor of the adapter on this model."""
    modules, parameters = set(), set()
    for name in names:
        if ".lora_" not in name:
            continue  # a module saved whole
        expert = _EXPERT.fullmatch(name)
        path = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
        module = _submodule(model, path)
        if isinstance(module, nn.Linear):
            modules.add(_last(path))
        elif module is not None and getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            parameters.add(f"{_last(path)}.weight")
        elif expert is not None and module is None:
            fused = next((f for f, parts in _FUSED.items() if expert["projection"] in parts), None)
            experts = expert["experts"].removeprefix(_PREFIX)
            _require_known_experts(_submodule(model, experts), experts, fused)
            parameters.add(fused)
        else:
            raise NotExportable(f"the model of transformers {transformers.__version__} has nothing at {path}")
    return modules, parameters


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _last(path: str) -> str:
    """The last part of a path: peft matches ends of them.

    No more than that, because peft 0.19 and later read mcore-bridge's form too, give it these names, and take no two
    adapters that have others: ms-swift loads the folder below a checkpoint as a second adapter.
    """
    return path.rpartition(".")[2]


def _require_known_experts(experts: nn.Module | None, path: str, fused: str | None) -> None:
    """Raises NotExportable unless the fused parameter is [E, O, I], with gate's rows before up's."""
    if fused is None or getattr(experts, fused, None) is None:
        raise NotExportable(f"{path} has no fused parameter for these factors")
    if getattr(experts, "is_transposed", None) is not False or getattr(experts, "is_concatenated", None) is not True:
        raise NotExportable(f"{type(experts).__name__} holds its experts in another order than [experts, out, in]")


def _fused_factors(injected: nn.Module, saved, names: set[str]) -> tuple[dict[str, Tensor], set[str]]:
    """(factors of all fused experts by the names that peft gives them, the saved names they were made from)."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for expert in filter(None, map(_EXPERT.fullmatch, names)):
        numbers[expert["experts"]].add(int(expert["index"]))
    swapped = swaps_expert_features()

    tensors, used = {}, set()
    for name, module in injected.named_modules():
        # Two parameters of one module are wrapped in each other: `experts` holds one, `experts.base_layer` the other.
        experts = name
        while experts.endswith(".base_layer"):
            experts = experts.removesuffix(".base_layer")
        if not isinstance(module, ParamWrapper) or experts not in numbers:
            continue
        n = module.get_param().shape[0]
        if numbers[experts] != set(range(n)):
            raise NotExportable(f"{experts} has {n} experts and the adapter has {len(numbers[experts])}")
        sources = [[f"{experts}.{i}.{part}" for part in _FUSED[module.parameter_name]] for i in range(n)]
        a_ERI, b_EOR = _stack(saved, sources)
        lora_a, lora_b = pack_experts(a_ERI, b_EOR, swapped=swapped)
        tensors |= {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}
        used |= {f"{part}.lora_{side}.weight" for parts in sources for part in parts for side in "AB"}
    return tensors, used


def _stack(saved, sources: list[list[str]]) -> tuple[Tensor, Tensor]:
    """[E, R, I] and [E, O, R] of each expert's projections, fused along O; they must share their A, as in Megatron."""
    a, b = [], []
    for parts in sources:
        a_parts = [saved.get_tensor(f"{part}.lora_A.weight") for part in parts]
        if not all(torch.equal(a_parts[0], other) for other in a_parts):
            raise NotExportable(f"{' and '.join(parts)} do not share one A")
        a.append(a_parts[0])
        b.append(torch.cat([saved.get_tensor(f"{part}.lora_B.weight") for part in parts]))
    return torch.stack(a), torch.stack(b)


def pack_experts(a_ERI: Tensor, b_EOR: Tensor, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """The experts' factors as the two matrices of peft's ParamWrapper.

    Args:
        a_ERI, b_EOR: the update of expert e is b[e] @ a[e], up to LoRA's scale.
        swapped: peft takes the parameter for [E, I, O] (see `swaps_expert_features`), so that its A holds our B.

    Returns:
        (lora_A, lora_B), contiguous: [E·R, I] and [O, R·E], or [E·R, O] and [I, R·E] where swapped.
    """
    first_ERI, last_ERO = a_ERI, b_EOR.transpose(1, 2)
    if swapped:
        first_ERI, last_ERO = last_ERO, first_ERI
    # peft reads A as experts × rank, and B as rank × experts.
    return first_ERI.flatten(0, 1).contiguous(), last_ERO.permute(2, 1, 0).flatten(1, 2).contiguous()


def swaps_expert_features() -> bool:
    """Whether the installed peft takes a parameter [E, O, I] for [E, I, O]: below 0.19 it does, later not."""
    probe = nn.Module()
    probe.experts = nn.Module()
    probe.experts.w = nn.Parameter(torch.zeros(2, 3, 5))
    inject_adapter_in_model(LoraConfig(r=1, target_modules=[], target_parameters=["experts.w"]), probe)
    return probe.experts.lora_A["default"].in_features == 3


def _require_same(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises NotExportable where peft would miss a tensor, or get one of another shape."""
    missing, left_over = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or left_over:
        raise NotExportable(
            f"{len(missing)} tensors are missing and {len(left_over)} have no place: "
            f"{json.dumps((missing + left_over)[:3])}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise NotExportable(f"{name} is {list(tensor.shape)}, and peft expects {list(wanted[name].shape)}")
