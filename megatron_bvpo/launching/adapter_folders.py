"""Adapters that a run starts from, or measures against: the form that Megatron reads, and settings it would lose.

ms-swift takes rank, alpha, dropout, rsLoRA and bias from the `adapter_config.json` of `--adapters`, nothing from that
of `--ref_adapters` (it gets the run's own settings), and from neither what makes the update another one: DoRA, ranks of
single modules, weights that an initialisation moved into the base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Where a checkpoint of ours keeps the factors of each expert, if peft needs another form of them (host/peft_export.py).
PER_EXPERT = "vllm"
# vLLM's --max-lora-rank takes these and no others.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Settings of peft that mcore-bridge has no place for, with the values under which they say nothing.
NO_PLACE = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    # These put a part of the base model into the factors, so that the base model alone is another one.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
# The run's flag: peft's name.
PEFT_NAMES = {"lora_rank": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora"}


def per_expert_form(adapter: str) -> str:
    """The folder of a saved adapter that mcore-bridge can read: `adapter` itself, or the one below it."""
    below = Path(adapter) / PER_EXPERT
    return str(below) if (below / WEIGHTS).is_file() else adapter


def use_readable_forms(args: Any) -> None:
    """Point `--adapters` and `--ref_adapters` at the form that Megatron reads."""
    for flag in ("adapters", "ref_adapters"):
        given = getattr(args, flag)
        setattr(args, flag, [per_expert_form(a) for a in ([given] if isinstance(given, str) else given or [])])


def check_adapters(args: Any) -> None:
    """Raise UserError for a setting of a given adapter that the run would drop without a word.

    Args:
        args: after ms-swift has taken what it takes from `--adapters`.
    """
    for flag in ("adapters", "ref_adapters"):
        for folder in getattr(args, flag):
            file = Path(folder) / CONFIG
            config = _read(file, flag)
            for name, harmless in NO_PLACE.items():
                if config.get(name) not in harmless:
                    raise UserError(
                        f"{name} is {config[name]!r}, and the Megatron backend has no place for it",
                        file=str(file),
                        field=f"--{flag}",
                        remedy="merge the adapter into its base model (swift export --merge_lora true) and start there",
                    )
            _require_same(args, config, file, flag, {theirs: mine for mine, theirs in PEFT_NAMES.items()})
    for flag in ("mcore_adapter", "mcore_ref_adapter"):
        folder = getattr(args, flag)
        if folder and (flag == "mcore_ref_adapter" or args.finetune):  # else host/saving.py compares what was saved
            file = Path(folder) / "args.json"
            names = (*PEFT_NAMES, *(("bvpo_new_layers_only",) if flag == "mcore_adapter" else ()))
            _require_same(args, _read(file, flag), file, flag, {name: name for name in names})


def _require_same(args: Any, saved: dict[str, Any], file: Path, flag: str, names: dict[str, str]) -> None:
    """Raise UserError where a saved setting (its name: the run's) is another than the run's, which it would get."""
    for theirs, mine in names.items():
        if theirs in saved and saved[theirs] != getattr(args, mine):
            raise UserError(
                f"{theirs} is {saved[theirs]!r} and this run's is {getattr(args, mine)!r}, which it would get",
                file=str(file),
                field=f"--{flag}",
                remedy=f"give --{mine} {saved[theirs]}, or merge the adapter and give it as a model",
            )


def _read(file: Path, flag: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as e:
        raise UserError(f"cannot be read: {e}", file=str(file), field=f"--{flag}") from None


def max_rank(rank: int) -> int:
    """What to give a server as --max-lora-rank. Raises UserError above all of them."""
    found = next((r for r in MAX_RANKS if r >= rank), None)
    if found is None:
        raise UserError(
            f"vLLM takes adapters of rank {MAX_RANKS[-1]} at most, and this is one of {rank}",
            field="r",
            remedy="use --merge",
        )
    return found
