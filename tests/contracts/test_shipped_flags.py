"""What GPU configurations have on, and cheap CPU runs turn off, is on in some cell; else there is a reason.

The cells with SHIPPED_FLAGS are in tests/distributed: test_parity, test_probe, test_engine_calls, test_compiled.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

import pytest
import yaml

from tests.distributed.cells import CPU_FLAGS, ROOT, SHIPPED_FLAGS

NOT_SHIPPED = ("rehearsal", "sampling_", "rounds_", "sweep_")
CONFIGS = [file for file in sorted((ROOT / "configs").glob("*.yaml")) if not file.stem.startswith(NOT_SHIPPED)]
ELSEWHERE = {
    "ddp_backend": "NCCL needs GPUs: docs/first-gpu-run.md",
    "attention_backend": "which kernel computes it: the stand-in is one for all",
    "torch_dtype": "the bf16 cells of test_parity, test_resume and test_shipped_configs",
    "fp16": "derived from the model's dtype, off for all models here",
    "bf16": "as torch_dtype",
    "check_model": "asks a hub for the model's files",
    "add_version": "names the run's folder by the time",
}


def flags(words: list[str]) -> dict[str, str]:
    return dict(zip((word.lstrip("-") for word in words[::2]), words[1::2], strict=True))


@functools.cache
def defaults() -> dict[str, object]:
    """ms-swift's own, read from its sources: importing them takes seconds."""
    folder = Path(importlib.util.find_spec("swift").submodule_search_locations[0]) / "megatron" / "arguments"
    found = {}
    for file in ("megatron_args.py", "megatron_base_args.py", "sft_args.py"):
        for node in ast.walk(ast.parse((folder / file).read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant):
                found[node.target.id] = node.value.value
    return found


@functools.cache
def shipped(flag: str) -> set[str]:
    """The values that the GPU configurations run with."""
    default = defaults().get(flag)
    return {str(yaml.safe_load(file.read_text()).get(flag, default)).lower() for file in CONFIGS}


def turned_off() -> dict[str, str]:
    """What CPU runs set to something that no GPU configuration has: the tests', and those of the shipped rehearsal."""
    own = yaml.safe_load((ROOT / "configs" / "rehearsal.yaml").read_text())
    shown = {flag: str(own[flag]).lower() for flag in flags(CPU_FLAGS) if flag in own}
    return {
        flag: value
        for values in (shown, flags(CPU_FLAGS))
        for flag, value in values.items()
        if flag in defaults() and shipped(flag) != {value}
    }


@pytest.mark.parametrize("flag", sorted(turned_off()))
def test_what_is_turned_off_is_rehearsed(flag):
    rehearsed = flags(SHIPPED_FLAGS).get(flag)
    if rehearsed is None:
        assert flag in ELSEWHERE, f"GPU configurations have {flag} {shipped(flag)}, and no cell rehearses it"
    elif flag == "dataloader_num_workers":  # as many as ms-swift's would need more cores
        assert int(rehearsed) > 0
    else:
        assert rehearsed in shipped(flag)


def test_the_reasons_are_for_what_is_turned_off():
    assert ELSEWHERE.keys() <= flags(CPU_FLAGS).keys() and not ELSEWHERE.keys() & flags(SHIPPED_FLAGS).keys()
    assert "gradient_accumulation_fusion" in turned_off() and "moe_permute_fusion" in turned_off()
