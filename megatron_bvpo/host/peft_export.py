"""The two forms of a saved MoE adapter, each in a folder where its reader finds it or fails.

mcore-bridge saves one pair of LoRA factors for each expert and projection (`…experts.0.gate_proj.lora_A`),
which vLLM and the Megatron backend read. transformers 5 holds the experts of a layer as two parameters, `gate_up_proj`
and `down_proj`, so peft below 0.19 finds no module of those names and drops the factors without a word (later ones fuse
them, and scale them otherwise under rsLoRA); and the router is no `nn.Linear` any more, which peft refuses. What peft
can do is target parameters. So the checkpoint itself gets the same numbers in peft's form (peft and `swift infer` read
it; vLLM refuses its names), and mcore-bridge's files move below it, to `vllm/`: before the checkpoint is published,
since that is two renames, while peft's form takes some 20 s of a core for a 235B adapter, and is written behind it. In
three steps:

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from swift.utils import get_logger
from torch import Tensor, nn

from megatron_bvpo.launching.adapter_folders import CONFIG, PER_EXPERT, WEIGHTS

logger = get_logger()

# A file in a checkpoint whose peft form is not written yet, and the folder in which it is.
DUE = "peft_form_is_due"
_PARTIAL = ".peft-form"
_VERSIONS = f"peft {peft.__version__} with transformers {transformers.__version__}"
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.lora_(?P<side>[AB])\.weight")
_ROUTER = re.compile(r"\.(gate|router)\.lora_[AB]\.weight$")
# The projections that each fused parameter holds, in the order of its output features.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class NotExportable(Exception):
    """The reason why there is no peft form of this adapter."""


def set_aside(checkpoint: Path) -> None:
    """Move the adapter of a checkpoint that peft must not find to `checkpoint/vllm`, and note that peft's form is due.

    Before the checkpoint is published: from then on whatever kills the run, peft finds its own form or none. Nothing
    moves where one form is for all, as for a dense model.

    Args:
        checkpoint: a folder with `adapter_config.json` and `adapter_model.safetensors`; without them (full tuning, or
            no safetensors asked for) nothing happens.
    """
    weights = checkpoint / WEIGHTS
    if not weights.is_file():
        return
    with safe_open(str(weights), framework="pt") as saved:
        two_forms = any(_EXPERT.fullmatch(name) or _ROUTER.search(name) for name in saved.keys())  # noqa: SIM118
    if not two_forms:
        logger.info("The saved adapter is for peft, swift and vLLM alike.")
        return
    (checkpoint / DUE).touch()
    folder = checkpoint / PER_EXPERT
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (checkpoint / name).rename(folder / name)
    if (checkpoint / "args.json").is_file():  # ms-swift takes the model and the template from it
        shutil.copy(checkpoint / "args.json", folder)


def is_due(checkpoint: Path) -> bool:
    """Whether peft's form of a checkpoint's adapter has still to be written: the run was ended before it was."""
    return (checkpoint / DUE).exists()


def write_peft_form(checkpoint: Path, hf_config: Any) -> None:
    """Write peft's form of an adapter that was set aside; says what each folder is for. One rank calls this.

    It may be killed at any time and called again. What goes wrong is logged and never raised: the checkpoint is whole
    without it.

    Args:
        hf_config: the model's Hugging Face config.
    """
    if not is_due(checkpoint):
        return
    try:
        form = None
        if (checkpoint / PER_EXPERT / WEIGHTS).is_file():  # else it was killed while it moved them back
            with safe_open(str(checkpoint / PER_EXPERT / WEIGHTS), framework="pt") as saved:
                form = _peft_form(checkpoint / PER_EXPERT, hf_config, saved, set(saved.keys()))
                if form is not None:
                    _put_in_place(checkpoint, *form)
    except (OSError, SafetensorError) as e:
        logger.warning(
            f"peft's form of the adapter {checkpoint.name} could not be written ({e}); the next save tries again. "
            f"{checkpoint.name}/{PER_EXPERT} holds it for vLLM and for --adapters of a Megatron run."
        )
        return
    except Exception as e:  # an extra must never cost the run, whatever an unknown model raises
        reason = str(e) if isinstance(e, NotExportable) else f"{type(e).__name__}: {e}"
        logger.warning(
            f"The saved adapter has no form for {_VERSIONS}: {reason}. {checkpoint.name}/{PER_EXPERT} holds it "
            "for vLLM and for --adapters of a Megatron run; peft would load a part of it, so it is not where "
            "peft looks. The merged model (--merge_lora true) is for all of them."
        )
    else:
        if form is None:
            _move_back(checkpoint)
            logger.info("The saved adapter is for peft, swift and vLLM alike: this transformers keeps experts apart.")
        else:
            logger.info(
                f"The saved adapter {checkpoint.name} is for {_VERSIONS}, whose experts are fused; the same numbers, "
                f"one pair of factors for each expert, are in {checkpoint.name}/{PER_EXPERT}: for vLLM and for "
                "--adapters of a Megatron run."
            )
    (checkpoint / DUE).unlink(missing_ok=True)


def _put_in_place(checkpoint: Path, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Weights first: where a config stands, its weights are whole."""
    partial = checkpoint / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(tensors, str(partial / WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(partial))
    for name in (WEIGHTS, CONFIG):
        (partial / name).replace(checkpoint / name)
    shutil.rmtree(partial, ignore_errors=True)


def _move_back(checkpoint: Path) -> None:
    folder = checkpoint / PER_EXPERT
    for name in (WEIGHTS, CONFIG):
        if (folder / name).exists():
            (folder / name).replace(checkpoint / name)
    shutil.rmtree(folder, ignore_errors=True)


def _peft_form(folder: Path, hf_config: Any, saved, names: set[str]) -> tuple[LoraConfig, dict[str, Tensor]] | None:
    """peft's config and tensors; None where the saved ones load as they are. Raises NotExportable."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, trust_remote_code=True)
    modules, parameters = _targets(model, names)
    if not parameters:
        return None

    config = LoraConfig.from_pretrained(str(folder))
    if config.use_dora or config.lora_bias:
        raise NotExportable("peft has no DoRA and no LoRA bias for parameters")
    config.target_modules, config.target_parameters = sorted(modules), sorted(parameters)
    config.lora_dropout = 0.0  # peft has none for parameters, and a saved adapter is there to be used
    injected, wanted = _inject(model, config)

    tensors, used = _fused_factors(injected, saved, names)
    tensors |= {name: saved.get_tensor(name) for name in names - used}
    _require_same(tensors, wanted)
    return config, tensors


def _inject(model: nn.Module, config: LoraConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """(the model with an adapter of that config, every tensor that peft will look for); all on the meta device."""
    injected = get_peft_model(model, deepcopy(config), low_cpu_mem_usage=True)
    return injected, get_peft_model_state_dict(injected, save_embedding_layers=False)


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
    # peft reads A as experts × rank, and B as rank × experts. Each is a copy of rows or of a transposed matrix, which
    # torch does fast.
    if swapped:
        first, last = b_EOR.transpose(1, 2).flatten(0, 1), a_ERI.transpose(0, 1).flatten(0, 1).t()
    else:
        first, last = a_ERI.flatten(0, 1), b_EOR.flatten(1, 2).t().unflatten(0, b_EOR.shape[1:]).flatten(1, 2)
    return first.contiguous(), last.contiguous()


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
