"""`bvpo export` on folders made here: merges, the engine's adapter, whole models."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from megatron_bvpo.export import merging
from megatron_bvpo.launching.adapter_folders import max_rank
from tests.unit import exports
from tests.unit.exports import ALPHA, DENSE, EXPERTS, MIXTURE, MTP, PREFIX, RANK, E, F, export, write_trained


def expected(base: dict, adapter: dict, scale: float) -> dict[str, torch.Tensor]:
    """W + scale · B A in float64, for weights of experts apart."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name, factor in adapter.items():
        if ".lora_A." in name:
            path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            update = scale * adapter[name.replace(".lora_A.", ".lora_B.")].double() @ factor.double()
            found[f"{path}.weight"] += update
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_sum_rounded_once(tmp_path, monkeypatch, dtype, rslora):
    monkeypatch.setattr(merging, "CHUNK", 8 * 24 * 5)  # five rows at a time: no tensor has a multiple of them
    tensors = exports.base_tensors(dtype)
    base = exports.write_model(tmp_path / "base", tensors)
    checkpoint = exports.write_checkpoint(tmp_path / "checkpoint-7", base, use_rslora=rslora)
    assert export(checkpoint, "--merge", "--out", tmp_path / "out") == 0
    merged, scale = exports.read_model(tmp_path / "out"), ALPHA / (math.sqrt(RANK) if rslora else RANK)
    wanted = expected(tensors, exports.adapter_tensors(DENSE | MIXTURE), scale)
    assert merged.keys() == tensors.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, wanted[name].to(dtype)), name
    changed = {name for name in tensors if not torch.equal(tensors[name], merged[name])}
    assert changed == {f"{path}.weight" for path in DENSE | MIXTURE}


def test_experts_that_are_fused_on_disk_are_merged_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "CHUNK", 8 * 24 * 3)
    apart, fused = exports.base_tensors(), exports.base_tensors(fused=True)
    for name in MIXTURE:
        experts, index, part = name.rsplit(".", 2)
        weight = fused[f"{experts}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(index)]
        apart[f"{name}.weight"] = weight[F:] if part == "up_proj" else weight[:F] if part == "gate_proj" else weight
    base = exports.write_model(tmp_path / "base", fused)
    export(exports.write_checkpoint(tmp_path / "checkpoint-7", base), "--merge", "--out", tmp_path / "out")
    merged = exports.read_model(tmp_path / "out")
    wanted = expected(apart, exports.adapter_tensors(DENSE | MIXTURE), ALPHA / RANK)
    for i in range(E):
        gate_up = torch.cat([wanted[f"{EXPERTS}.{i}.{part}.weight"] for part in ("gate_proj", "up_proj")])
        assert torch.equal(merged[f"{EXPERTS}.gate_up_proj"][i], gate_up.bfloat16())
        assert torch.equal(merged[f"{EXPERTS}.down_proj"][i], wanted[f"{EXPERTS}.{i}.down_proj.weight"].bfloat16())


def test_a_merge_copies_everything_else(tmp_path):
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    export(exports.write_checkpoint(tmp_path / "checkpoint-7", base), "--merge", "--out", tmp_path / "out")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()} | {"bvpo_export.json"}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    note = json.loads((out / "bvpo_export.json").read_text())
    assert (note["form"], note["iteration"], note["model"]) == ("merged model", 7, str(base))
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


MEMORY = """
import re, sys, torch
from pathlib import Path
from megatron_bvpo.export.adapter import Adapter
from megatron_bvpo.export.merging import merge
from megatron_bvpo.export.tensor_files import ModelFiles
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
torch.ones(64, 64, dtype=torch.float64) @ torch.ones(64, 64, dtype=torch.float64)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = peak()
Path(sys.argv[3]).mkdir()
merge(ModelFiles(Path(sys.argv[1]), ""), Adapter(Path(sys.argv[2])), Path(sys.argv[3]))
print(peak() - before)
"""


def test_a_merge_holds_a_chunk_of_one_tensor(tmp_path):
    """Four adapted tensors of 48 MiB in two files: the float64 sum of one alone would be 192 MiB."""
    paths = {f"model.layers.{i}.self_attn.q_proj": (8192, 3072) for i in range(4)}
    tensors = {f"{path}.weight": torch.ones(shape, dtype=torch.bfloat16) for path, shape in paths.items()}
    base = exports.write_model(tmp_path / "base", tensors)
    folder = exports.write_checkpoint(tmp_path / "c", base, exports.adapter_tensors(paths)) / "vllm"
    del tensors
    command = [sys.executable, "-c", MEMORY, str(base), str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{grown} MiB more at the most")
    assert grown < 150
    merged = exports.read_model(tmp_path / "out")
    assert all((tensor != 1).any() for tensor in merged.values())


# ---- adapters


def test_an_engine_s_adapter_is_the_checkpoint_s(tmp_path):
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    checkpoint = exports.write_checkpoint(tmp_path / "checkpoint-7", base, use_rslora=True, target_modules="all-linear")
    export(checkpoint, "--out", tmp_path / "out")
    there = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert there.keys() == exports.adapter_tensors(DENSE | MIXTURE).keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in exports.adapter_tensors(DENSE | MIXTURE).items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (RANK, ALPHA, True)


@pytest.mark.parametrize("trained", [("gate_proj", "up_proj"), ("down_proj",)])
def test_projections_that_were_not_trained_become_zeros(tmp_path, trained):
    """vLLM's pack_moe asserts that each expert has all three."""
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    paths = {path: shape for path, shape in MIXTURE.items() if path.endswith(trained)}
    given = exports.adapter_tensors(paths)
    export(exports.write_checkpoint(tmp_path / "checkpoint-7", base, given), "--out", tmp_path / "out")
    there = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path, (n_out, n_in) in MIXTURE.items():
        a, b = there.pop(f"{PREFIX}{path}.lora_A.weight"), there.pop(f"{PREFIX}{path}.lora_B.weight")
        assert (a.shape, b.shape) == ((RANK, n_in), (n_out, RANK))
        if path in paths:
            assert torch.equal(b, given[f"{PREFIX}{path}.lora_B.weight"])
        else:
            assert not b.any() and not a.any()
    assert not there
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


def test_an_adapter_that_changes_nothing_is_told(tmp_path, capsys):
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    given = {
        name: 0 * tensor if "lora_B" in name else tensor for name, tensor in exports.adapter_tensors(DENSE).items()
    }
    export(exports.write_checkpoint(tmp_path / "checkpoint-7", base, given), "--out", tmp_path / "out")
    assert "every B is zero" in capsys.readouterr().out


def test_the_server_s_line_has_the_rank_that_it_takes(tmp_path, capsys):
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    export(exports.write_checkpoint(tmp_path / "checkpoint-7", base), "--out", tmp_path / "mine")
    said = capsys.readouterr().out
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules mine={tmp_path / 'mine'}\n" in said
    assert [max_rank(r) for r in (1, 2, 16, 33, 500)] == [1, 8, 16, 64, 512]


def test_an_adapter_without_its_model_is_written_and_told(tmp_path, capsys):
    checkpoint = exports.write_checkpoint(tmp_path / "checkpoint-7", tmp_path / "elsewhere")
    assert export(checkpoint, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "(Maker/Model): the shapes were not compared" in said and "vllm serve Maker/Model" in said


def test_a_whole_model_gets_back_what_training_dropped(tmp_path, capsys):
    tensors = exports.base_tensors()
    base = exports.write_model(tmp_path / "base", tensors)
    trained = {name: tensor + 1 for name, tensor in tensors.items() if name not in MTP}
    export(write_trained(tmp_path / "checkpoint-7", base, trained), "--out", tmp_path / "out")
    found = exports.read_model(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name] if name in MTP else trained[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["dtype"] == "bfloat16"
    assert "2 that training dropped are the base's" in capsys.readouterr().out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"generation_config.json", "tokenizer.json"} <= names and "args.json" not in names
    assert "model-00003-of-00003.safetensors" in names


def grow(folder) -> None:
    """As bvpo expand marks a model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bvpo_new_layers": [1]}))
    (folder / "expansion.json").write_text("{}")


@pytest.mark.parametrize("new", [[1], None])
def test_a_whole_model_has_the_new_layers_that_its_checkpoint_has(tmp_path, new):
    tensors = exports.base_tensors()
    base = exports.write_model(tmp_path / "base", tensors)
    grow(base)
    checkpoint = write_trained(tmp_path / "checkpoint-7", base, tensors)
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("bvpo_new_layers", None)
    (checkpoint / "config.json").write_text(json.dumps(config | ({"bvpo_new_layers": new} if new else {})))
    assert export(checkpoint, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/config.json").read_text()).get("bvpo_new_layers") == new
    assert (tmp_path / "out/expansion.json").exists() is bool(new)


def test_of_whole_layers_beside_adapters_the_merged_model_is_exported(tmp_path):
    """The checkpoint itself holds Megatron's files alone."""
    tensors = exports.base_tensors()
    base = exports.write_model(tmp_path / "base", tensors)
    grow(base)
    write_trained(tmp_path / "checkpoint-7-merged", base, {name: 2 * tensor for name, tensor in tensors.items()})
    (tmp_path / "checkpoint-7").mkdir()
    for name in ("bvpo_state.json", "args.json"):
        (tmp_path / "checkpoint-7-merged" / name).rename(tmp_path / "checkpoint-7" / name)
    assert export(tmp_path / "checkpoint-7", "--out", tmp_path / "out") == 0
    assert torch.equal(exports.read_model(tmp_path / "out")["lm_head.weight"], 2 * tensors["lm_head.weight"])
    assert "bvpo_new_layers" not in json.loads((tmp_path / "out/config.json").read_text())
    assert export(tmp_path / "checkpoint-7", "--merge", "--out", tmp_path / "again") == 2


def test_a_merged_model_has_no_new_layers(tmp_path):
    """Adapters were on its old layers, too: without its new ones it is not the model that was grown."""
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    grow(base)
    checkpoint = exports.write_checkpoint(tmp_path / "checkpoint-7", base)
    assert export(checkpoint, "--merge", "--out", tmp_path / "out") == 0
    assert "bvpo_new_layers" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not (tmp_path / "out/expansion.json").exists()


def test_a_tied_model_s_old_head_is_not_carried(tmp_path):
    """It would stand for the embedding before training."""
    tensors = exports.base_tensors()
    base = exports.write_model(tmp_path / "base", tensors, exports.CONFIG | {"tie_word_embeddings": True})
    trained = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    export(write_trained(tmp_path / "checkpoint-7", base, trained), "--out", tmp_path / "out")
    assert "lm_head.weight" not in exports.read_model(tmp_path / "out")
