"""`bvpo export --check`: what was exported, by transformers, beside what was trained, by transformers and peft."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from megatron_bvpo.cli import bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.export import logprob_check, sources
from megatron_bvpo.host.peft_export import set_aside, write_peft_form

RANK = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def layers(model: Path, routers: bool = False) -> dict[str, tuple[int, int]]:
    """Path → (O, I) of what an adapter of all linear layers has."""
    config = AutoConfig.from_pretrained(model)
    h, heads, kv, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = dict(zip(ATTENTION, ((heads * d, h), (kv * d, h), (kv * d, h), (h, heads * d)), strict=True))
    found = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{name}": shape for name, shape in attention.items()}
        moe = hasattr(config, "num_experts")
        f = config.moe_intermediate_size if moe else config.intermediate_size
        mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
        for where in [f"mlp.experts.{i}" for i in range(config.num_experts)] if moe else ["mlp"]:
            found |= {f"{prefix}.{where}.{name}": shape for name, shape in mlp.items()}
        if moe and routers:
            found[f"{prefix}.mlp.gate"] = (config.num_experts, h)
    return found


@pytest.fixture(scope="module", params=["dense", "moe"])
def trained(request, workshop, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, model)"""
    model = getattr(workshop, request.param)
    return write_trained(tmp_path_factory.mktemp("run") / "checkpoint-7", model, layers(model)), model


def write_trained(folder: Path, model: Path, adapted: dict[str, tuple[int, int]]) -> Path:
    """An adapter as a run leaves it, with peft's form of a mixture above the engine's."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {}
    for path, (n_out, n_in) in adapted.items():
        shared = path.replace("up_proj", "gate_proj")  # Megatron has one A for both
        first = tensors.get(f"base_model.model.{shared}.lora_A.weight", torch.randn(RANK, n_in))
        tensors[f"base_model.model.{path}.lora_A.weight"] = first.clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.02 * torch.randn(n_out, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({path.rpartition(".")[2] for path in adapted})
    LoraConfig(r=RANK, lora_alpha=8, use_rslora=True, target_modules=names, task_type="CAUSAL_LM").save_pretrained(
        folder
    )
    (folder / "args.json").write_text(json.dumps({"model": str(model), "model_dir": str(model)}))
    set_aside(folder)
    write_peft_form(folder, AutoConfig.from_pretrained(model))
    return folder


def test_a_router_s_adapter_is_merged(workshop, tmp_path):
    checkpoint = write_trained(tmp_path / "checkpoint-7", workshop.moe, layers(workshop.moe, routers=True))
    given = ["--merge", "--out", str(tmp_path / "out"), "--check", str(workshop.held_out)]
    assert bvpo(["export", str(checkpoint), *given]) == 0


@pytest.mark.parametrize("form", [[], ["--merge"]])
def test_an_export_has_the_log_probs_of_what_was_trained(trained, workshop, tmp_path, capsys, form):
    checkpoint, _ = trained
    out = tmp_path / "out"
    assert bvpo(["export", str(checkpoint), "--out", str(out), "--check", str(workshop.held_out), *form]) == 0
    said = re.search(
        r"check: \d+ tokens of 5 rows: .* at most (\S+), .* moved them by (\S+)\n", capsys.readouterr().out
    )
    largest, moved = map(float, said.groups())
    assert largest < 1e-4 < 0.05 < moved  # float32 itself is off by 2e-5 with these large random factors


def test_another_scale_is_found(trained, workshop, tmp_path):
    checkpoint, _ = trained
    out = tmp_path / "out"
    assert bvpo(["export", str(checkpoint), "--out", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    source = sources.find_source(str(checkpoint))
    base = sources.find_model(source, None)
    found = logprob_check.check(source, out, base, logprob_check.sequences_of(base, str(workshop.held_out)))
    assert not found.agrees and "do not use this export" in found.lines()[1]


def test_a_merge_that_rounds_the_training_away_is_found(workshop, tmp_path, capsys, trained):
    """Updates far below the last bit of bfloat16 weights."""
    checkpoint, model = trained
    coarse = shutil.copytree(model, tmp_path / "coarse")
    from safetensors.torch import load_file

    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, coarse / "model.safetensors", metadata={"format": "pt"})
    small = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    for file in small.rglob("adapter_model.safetensors"):
        save_file({n: t * (1e-3 if "lora_B" in n else 1) for n, t in load_file(file).items()}, file)
    # In peft's form of a mixture, B and A may change places; either carries the factor.
    arguments = ["export", str(small), "--merge", "--model", str(coarse), "--check", str(workshop.held_out)]
    assert bvpo([*arguments, "--out", str(tmp_path / "out")]) == 3
    assert "A merge into bfloat16 weights rounds small updates away" in capsys.readouterr().out


def test_what_cannot_be_checked_is_told_before_anything_is_written(trained, workshop, tmp_path, capsys):
    checkpoint, model = trained
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    given = ["--model", str(damaged), "--out", str(tmp_path / "out"), "--check", str(workshop.held_out)]
    assert bvpo(["export", str(checkpoint), *given]) == 2
    assert "damaged: --check: its tokenizer cannot be loaded (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_family_that_transformers_does_not_know(workshop, tmp_path):
    unknown = shutil.copytree(workshop.dense, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "no_such"}))
    with pytest.raises(UserError, match="transformers cannot load it .*leave --check out"):
        logprob_check._load(unknown)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"messages": [{"role": "user", "content": "?"}]}\n', "no row has messages that end in a response"),
        ('{"prompt": 1}\n', "no row has messages"),
    ],
)
def test_rows_without_a_response_are_refused(trained, tmp_path, rows, said):
    checkpoint, _ = trained
    (tmp_path / "rows.jsonl").write_text(rows)
    source = sources.find_source(str(checkpoint))
    with pytest.raises(UserError, match=said):
        logprob_check.sequences_of(sources.find_model(source, None), str(tmp_path / "rows.jsonl"))


def test_a_machine_that_is_too_small_is_told(trained, workshop, tmp_path, monkeypatch):
    import psutil

    checkpoint, _ = trained
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1 << 20}))
    source = sources.find_source(str(checkpoint))
    with pytest.raises(UserError, match="--check: the model takes .* GiB in float32, and .* are available"):
        logprob_check.sequences_of(sources.find_model(source, None), str(workshop.held_out))
