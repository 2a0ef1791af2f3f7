"""A checkpoint is published before its adapter is written for peft: killed after any file operation, it can be gone on
from, peft finds its own form or none, and the next save writes what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_bvpo.host import checkpoint as ckpt
from megatron_bvpo.host.peft_export import is_due, set_aside, write_peft_form
from megatron_bvpo.launching.adapter_folders import CONFIG, PER_EXPERT, WEIGHTS
from tests.unit.test_checkpoint import LINK, fill, killed_at

RANK = 2


@pytest.fixture(scope="module")
def config(workshop):
    return AutoConfig.from_pretrained(workshop.moe)


@pytest.fixture(scope="module")
def written(config, tmp_path_factory) -> Path:
    """An adapter as mcore-bridge writes it: a pair of factors for each expert, gate and up with one A."""
    torch.manual_seed(0)
    h, f = config.hidden_size, config.moe_intermediate_size
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}"
            for name, (inputs, outputs) in {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}.items():
                tensors[f"{prefix}.{name}.lora_A.weight"] = torch.randn(RANK, inputs)
                tensors[f"{prefix}.{name}.lora_B.weight"] = torch.randn(outputs, RANK)
            tensors[f"{prefix}.up_proj.lora_A.weight"] = tensors[f"{prefix}.gate_proj.lora_A.weight"].clone()
    folder = tmp_path_factory.mktemp("written")
    save_file(tensors, folder / WEIGHTS)
    modules = ["gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=RANK, lora_alpha=4, target_modules=modules, task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


def save(output_dir: Path, step: int, written: Path, config) -> None:
    """A save as the trainer orders it."""
    staging = ckpt.open_staging(output_dir)
    folder = staging / f"checkpoint-{step}"
    fill(folder, "new")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(written / name, folder)
    set_aside(folder)
    ckpt.write_state(folder, {"content": "new"})
    ckpt.publish(staging, folder.name)
    write_peft_form(output_dir / folder.name, config)


def form_of(checkpoint: Path) -> dict | None:
    """What peft finds there."""
    return load_file(checkpoint / WEIGHTS) if (checkpoint / CONFIG).exists() else None


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def later(output_dir: Path, config) -> None:
    """The part of the trainer's next save, or of its end, that looks for what is missing."""
    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    from megatron_bvpo.host.saving import write_peft_forms

    write_peft_forms(str(output_dir), config)


def test_killed_before_any_file_operation(written, config, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    save(whole, 4, written, config)
    expected = form_of(whole / "checkpoint-4")
    assert expected and not same(expected, load_file(written / WEIGHTS))
    later(whole, config)
    n, killed, due = 0, True, 0
    while killed:
        n += 1
        out = tmp_path / str(n)
        out.mkdir()
        killed = killed_at(n, lambda out=out: save(out, 4, written, config))
        checkpoint = out / "checkpoint-4"
        if not ckpt.is_whole(checkpoint):
            assert not checkpoint.exists() or not (checkpoint / ckpt.STATE_FILE).exists()
            continue
        ckpt.require_whole_checkpoint(str(checkpoint), flag="--mcore_adapter")
        found = form_of(checkpoint)
        assert found is None or same(found, expected), "peft finds its own form or none"
        assert same(load_file(checkpoint / PER_EXPERT / WEIGHTS), load_file(written / WEIGHTS)), "vLLM's is there"
        due += is_due(checkpoint)
        assert is_due(checkpoint) or found is not None
        later(out, config)
        assert not is_due(checkpoint) and same(form_of(checkpoint), expected)
        assert {p.name for p in checkpoint.iterdir()} == {p.name for p in (whole / "checkpoint-4").iterdir()}
        assert (out / LINK).exists() or killed
    assert due >= 4, "no kill fell between the publication and peft's form"


def test_a_disk_that_is_full_costs_the_form_and_not_the_run(written, config, tmp_path, monkeypatch, caplog):
    from megatron_bvpo.host import peft_export

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(peft_export, "save_file", full)
        with caplog.at_level("INFO", logger="swift"):
            save(tmp_path, 4, written, config)
    checkpoint = tmp_path / "checkpoint-4"
    assert is_due(checkpoint) and form_of(checkpoint) is None and "No space left" in caplog.text
    later(tmp_path, config)
    assert not is_due(checkpoint) and form_of(checkpoint) is not None
