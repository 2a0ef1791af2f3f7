"""Names of modules and parameters that a run tunes or freezes: checked against the model before its weights are read.

peft and ms-swift take a name that matches nothing for nothing to do, or say so after loading; and a `target_regex`
trains, but ms-swift does not save what peft knows by a pattern only.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TEGroupedLinear, TELayerNormColumnParallelLinear, TELinear
from megatron.core.transformer.moe.router import TopKRouter
from swift.megatron.utils.utils import get_modules_to_save, get_target_modules
from torch import nn

from megatron_bvpo.errors import UserError

# What mcore-bridge and peft can put an adapter on.
ADAPTABLE = (TELayerNormColumnParallelLinear, TELinear, TEGroupedLinear, TopKRouter, nn.Linear, nn.Embedding)
_LAYER = re.compile(r"\blayers\.\d+\.")


def check_tuner_names(args: Any, models: list[nn.Module]) -> None:
    """Raise UserError for names that this model does not have. Collective; `models` are this rank's chunks.

    A `target_regex` becomes the list of names that it matches, which can be saved.
    """
    _check_parameter_names(args, models)
    if args.tuner_type == "full":
        return
    modules = {name: module for model in models for name, module in model.named_modules()}
    targets = get_target_modules(args, models[0])
    flag = "target_regex" if args.target_regex else "target_modules"
    if isinstance(targets, str) and not args.target_regex:
        return  # ms-swift's own pattern of a model with images
    found = {name: module for name, module in modules.items() if _is_target(name, targets)}
    _require_adaptable(found, flag)
    everywhere = _gathered(set(found))
    if isinstance(targets, list):
        _require_all_matched(targets, everywhere, _gathered(set(modules)), flag)
    if not set().union(*everywhere):
        raise UserError(f"{targets!r} matches no module of the model", field=f"--{flag}", remedy=_some(modules))
    if not all(everywhere):
        raise UserError(
            f"matches nothing on rank {everywhere.index(set())}, and peft needs a module on every rank",
            field=f"--{flag}",
            remedy="add modules that every pipeline stage has, such as linear_qkv",
        )
    _require_all_layers(found, modules, flag)
    if isinstance(targets, str):
        args.target_modules = sorted({_LAYER.split(name)[-1] for names in everywhere for name in names})
        more = {name for name in modules if _is_target(name, args.target_modules)} - set(found)
        _require(not any(_gathered(more)), f"has no list of names that means the same: {sorted(more)[:3]}", flag)
    _check_saved_modules(args, models[0], modules)


def require_something_to_train(models: list[nn.Module]) -> None:
    """Raise UserError where no rank has a parameter to train. Collective."""
    if not any(_gathered(any(p.requires_grad for model in models for p in model.parameters()))):
        raise UserError(
            "nothing is left to train: every parameter is frozen",
            field="--freeze_parameters",
            remedy="freeze less, or name what trains in --trainable_parameters",
        )


def _is_target(name: str, targets: str | list[str]) -> bool:
    """As peft matches: a pattern whole, a name from a dot to the end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _gathered(mine: Any) -> list:
    """This rank's and all others'."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _require(ok: bool, problem: str, flag: str, remedy: str | None = None) -> None:
    if not ok:
        raise UserError(problem, field=f"--{flag}", remedy=remedy)


def _some(modules: dict[str, nn.Module]) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, ADAPTABLE)})
    return f"there are all-linear, all-router and {', '.join(names[:12])}"


def _require_adaptable(found: dict[str, nn.Module], flag: str) -> None:
    wrong = [f"{name} ({type(module).__name__})" for name, module in found.items() if not isinstance(module, ADAPTABLE)]
    told = [names for names in _gathered(wrong) if names]
    _require(not told, f"has no LoRA for {told and told[0][0]}", flag, "name linear modules or the router")


def _require_all_matched(targets: list[str], found: list[set[str]], there: list[set[str]], flag: str) -> None:
    names = set().union(*found)
    for target in targets:
        if not any(_is_target(name, [target]) for name in names):
            kinds = sorted({name.rpartition(".")[2] for rank in there for name in rank if "linear" in name})
            _require(
                False,
                f"has {target!r}, which no module of the model is called",
                flag,
                f"Megatron's names are {', '.join(kinds[:12])}; all-linear and all-router stand for all of their kind",
            )


def _require_all_layers(found: dict[str, nn.Module], modules: dict[str, nn.Module], flag: str) -> None:
    """Megatron keeps the same parameter of all layers as one array, so that an adapter needs all of them, too."""
    kinds = {_LAYER.sub("layers.*.", name) for names in _gathered(set(found)) for name in names}
    partly = [kind for kind in kinds if _count(found)[kind] != _count(modules)[kind]]
    told = [names for names in _gathered(sorted(partly)) if names]
    _require(
        not told,
        f"matches {told and told[0][0]} in some layers only, and Megatron's checkpoints hold all layers as one",
        flag,
        "leave the number of the layer out",
    )


def _count(names) -> Counter:
    return Counter(_LAYER.sub("layers.*.", name) for name in names)


def _check_saved_modules(args: Any, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Modules that are trained whole, of which peft makes a copy."""
    flag = "modules_to_save"
    wanted = get_modules_to_save(args, model)
    found = {target: [name for name in modules if name.endswith(target)] for target in wanted}
    there = set().union(*_gathered({target for target, names in found.items() if names}))
    for target in args.modules_to_save:
        if target not in there and target != "all-embedding":
            _require(False, f"has {target!r}, which no module of the model is called", flag, _some(modules))
    stuck = sorted(name for names in found.values() for name in names if _holds_group(modules[name]))
    told = [names for names in _gathered(stuck) if names]
    _require(
        not told,
        f"has {told and told[0][0]}, of which no copy can be made: it holds a process group",
        flag,
        "word_embeddings stands for the embedding",
    )


def _holds_group(module: nn.Module) -> bool:
    """Whether a copy would have to copy a process group; mcore-bridge leaves out those of the module itself."""
    return any(
        isinstance(value, dist.ProcessGroup)
        for part in module.modules()
        for key, value in vars(part).items()
        if not (part is module and key in ("tp_group", "_tp_group"))
    )


def _check_parameter_names(args: Any, models: list[nn.Module]) -> None:
    names = [name for model in models for name, _ in model.named_parameters()]
    for flag in ("freeze_parameters", "trainable_parameters"):
        for start in getattr(args, flag):
            there = any(_gathered(any(name.startswith(start) for name in names)))
            _require(there, f"has {start!r}, with which no parameter's name begins", flag, _beginnings(names))
    for flag in ("freeze_parameters_regex", "trainable_parameters_regex"):
        pattern = getattr(args, flag)
        if pattern is not None:
            there = any(_gathered(any(re.search(pattern, name) for name in names)))
            _require(there, f"{pattern!r} matches no parameter's name", flag, _beginnings(names))


def _beginnings(names: list[str]) -> str:
    return f"names are like {', '.join(names[:3])}"
