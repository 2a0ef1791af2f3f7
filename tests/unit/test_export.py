"""`bvpo export`: what it writes is what was trained, to rounding, and what it cannot write so is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bvpo.cli import bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.export import merging
from megatron_bvpo.launching.adapter_folders import max_rank
from tests.unit import exports
from tests.unit.exports import ALPHA, DENSE, EXPERTS, MIXTURE, MTP, RANK, E, F, Q

PREFIX = "base_model.model."


def export(*arguments) -> int:
    return bvpo(["export", *map(str, arguments)])


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


# ---- whole models


def write_trained(folder, base, tensors):
    exports.write_model(folder, tensors, {"dtype": "bfloat16", **exports.CONFIG, "num_nextn_predict_layers": 0})
    exports.write_run_files(folder, base)
    return folder


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


def test_a_tied_model_s_old_head_is_not_carried(tmp_path):
    """It would stand for the embedding before training."""
    tensors = exports.base_tensors()
    base = exports.write_model(tmp_path / "base", tensors, exports.CONFIG | {"tie_word_embeddings": True})
    trained = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    export(write_trained(tmp_path / "checkpoint-7", base, trained), "--out", tmp_path / "out")
    assert "lm_head.weight" not in exports.read_model(tmp_path / "out")


# ---- what is refused


@pytest.fixture
def files(tmp_path):
    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    return base, exports.write_checkpoint(tmp_path / "checkpoint-7", base)


def set_config(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def adapter_with(checkpoint, change) -> None:
    file = checkpoint / "vllm" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def base_with(base, **tensors):
    found = {name: tensor for name, tensor in (exports.base_tensors() | tensors).items() if tensor is not None}
    config = json.loads((base / "config.json").read_text())
    shutil.rmtree(base)
    exports.write_model(base, found, config)


def widen(tensors):
    tensors[f"{PREFIX}{Q}.lora_B.weight"] = torch.zeros(7, RANK)


def rename(tensors):
    for side in "AB":
        name = f"{PREFIX}{Q}.lora_{side}.weight"
        tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


def lose(name):
    return lambda tensors: tensors.pop(f"{PREFIX}{name}")


def spoil(tensors):
    tensors[f"{PREFIX}{Q}.lora_A.weight"][1, 2] = math.nan


def add_head(tensors):
    tensors |= exports.adapter_tensors({"lm_head": (11, exports.H)})


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


BAD = {
    # name: (what is changed, more arguments, what is said)
    "no checkpoint": (lambda b, c: shutil.rmtree(c), [], "CHECKPOINT: there is no folder"),
    "a run": (lambda b, c: (c / "last-checkpoint").mkdir(), [], "is a run's folder; give one of its checkpoints"),
    "megatron's files": (
        lambda b, c: (shutil.rmtree(c / "vllm"), (c / "iter_0000007").mkdir()),
        [],
        "Megatron's own files alone; give a checkpoint of a run with --save_safetensors true",
    ),
    "half an adapter": (lambda b, c: cut(c / "vllm" / "adapter_model.safetensors"), [], "is no whole safetensors file"),
    "a factor is missing": (
        lambda b, c: adapter_with(c, lose(f"{Q}.lora_B.weight")),
        [],
        "q_proj has no lora_B: a part of the adapter is missing",
    ),
    "an expert is missing": (
        lambda b, c: adapter_with(
            c, lambda t: [lose(f"{EXPERTS}.1.{p}.lora_{s}.weight")(t) for p in exports.SHAPES for s in "AB"]
        ),
        [],
        "has 3 experts, and 2 of them have factors",
    ),
    "another shape": (
        lambda b, c: adapter_with(c, widen),
        [],
        "of another model: .*q_proj.weight is .48, 24. there, .7, 24.",
    ),
    "another layer": (
        lambda b, c: adapter_with(c, rename),
        [],
        "nothing there is called model.layers.9.self_attn.q_proj",
    ),
    "another config": (
        lambda b, c: set_config(b / "config.json", num_hidden_layers=3),
        [],
        "of another model: num_hidden_layers 2 there and 3 here; give the model .*Maker/Model",
    ),
    "another rank": (lambda b, c: set_config(c / "vllm" / "adapter_config.json", r=3), [], "expected rank 3"),
    "a rank of True": (lambda b, c: set_config(c / "vllm" / "adapter_config.json", r=True), [], "r: is True, expected"),
    "a scale of nothing": (
        lambda b, c: set_config(c / "vllm" / "adapter_config.json", lora_alpha=0),
        [],
        "lora_alpha: is 0, expected a number other than 0",
    ),
    "a scale that is no number": (
        lambda b, c: set_config(c / "vllm" / "adapter_config.json", lora_alpha=math.nan),
        [],
        "lora_alpha: is nan",
    ),
    "a run that diverged": (lambda b, c: adapter_with(c, spoil), [], "q_proj has factors that are no numbers"),
    "the same, merged": (lambda b, c: adapter_with(c, spoil), ["--merge"], "q_proj has factors that are no numbers"),
    "a damaged state": (
        lambda b, c: (c / "bvpo_state.json").write_text('{"model": "x"}'),
        [],
        "bvpo_state.json: is damaged: the model is 'x'",
    ),
    "no config": (lambda b, c: (b / "config.json").unlink(), [], "base: --model: holds no config.json"),
    "a damaged index": (
        lambda b, c: (b / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        ["--merge"],
        "weight_map: maps no tensors to files",
    ),
    "dora": (lambda b, c: set_config(c / "vllm" / "adapter_config.json", use_dora=True), [], "use_dora: is True"),
    "peft's form": (
        lambda b, c: set_config(c / "vllm" / "adapter_config.json", target_parameters=["down_proj"]),
        [],
        "target_parameters: this is peft's form .* folder vllm has",
    ),
    "trained whole": (
        lambda b, c: adapter_with(c, lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(11, 24)})),
        [],
        "lm_head.weight was trained whole .* use --merge",
    ),
    "a router": (
        lambda b, c: (
            base_with(b, **{"model.layers.1.mlp.gate.weight": torch.zeros(3, 24)}),
            adapter_with(c, lambda t: t.update(exports.adapter_tensors({"model.layers.1.mlp.gate": (3, 24)}))),
        ),
        [],
        "mlp.gate is a router, and vLLM would leave its factors out .* use --merge",
    ),
    "a full folder": (lambda b, c: None, ["--out", "BASE"], "--out: .* is there already; give a new folder"),
    "no such model": (lambda b, c: None, ["--model", "/nowhere"], "--model: there is no folder /nowhere"),
    "no such rows": (lambda b, c: None, ["--check", "/nowhere.jsonl"], "--check: there is no file /nowhere.jsonl"),
    "no model to merge into": (
        lambda b, c: shutil.rmtree(b),
        ["--merge"],
        "--model: a merge needs the model .*, Maker/Model, and it is no folder",
    ),
    "a cut base": (
        lambda b, c: cut(b / "model-00002-of-00002.safetensors"),
        ["--merge"],
        "is no whole safetensors file",
    ),
    "a lost file": (
        lambda b, c: (b / "model-00002-of-00002.safetensors").unlink(),
        ["--merge"],
        "--model: the index names it and it is not there",
    ),
    "a quantised base": (
        lambda b, c: set_config(b / "config.json", quantization_config={"quant_method": "fp8"}),
        ["--merge"],
        "quantization_config: the base is quantised, .* in bfloat16 with --model",
    ),
    "float8 weights": (
        lambda b, c: base_with(b, **{f"{Q}.weight": torch.zeros(48, 24).to(torch.float8_e4m3fn)}),
        ["--merge"],
        "q_proj.weight is F8_E4M3, and nothing can be added to that",
    ),
    "a tied head": (
        lambda b, c: (set_config(b / "config.json", tie_word_embeddings=True), adapter_with(c, add_head)),
        ["--merge"],
        "tie_word_embeddings: lm_head.weight is adapted",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_be_wrong_is_refused(files, tmp_path, capfd, case):
    base, checkpoint = files
    change, more, said = BAD[case]
    change(base, checkpoint)
    arguments = ["--out", str(tmp_path / "out"), *(str(base) if a == "BASE" else a for a in more)]
    assert export(checkpoint, *arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({f"{Q}.weight": None}, "lacks 1 tensors of the base that are no layers for multi-token prediction"),
        (
            {f"{Q}.weight": torch.zeros(24, 24).bfloat16()},
            r"q_proj.weight is \[24, 24\] in the checkpoint and \[48, 24\]",
        ),
    ],
)
def test_a_whole_model_of_another_base_is_refused(tmp_path, changed, said):
    from megatron_bvpo.export.tensor_files import ModelFiles
    from megatron_bvpo.export.whole_model import write_whole_model

    base = exports.write_model(tmp_path / "base", exports.base_tensors())
    tensors = {name: tensor for name, tensor in (exports.base_tensors() | changed).items() if tensor is not None}
    saved = write_trained(tmp_path / "checkpoint-7", base, tensors)
    with pytest.raises(UserError, match=said):
        write_whole_model(ModelFiles(saved, ""), ModelFiles(base, ""), tmp_path / "out")
    assert export(saved, "--merge", "--out", tmp_path / "out") == 2, "nothing to merge"


def test_square_fused_experts_are_refused(tmp_path):
    """Nothing tells [out, in] from [in, out]."""
    from megatron_bvpo.export.adapter import Adapter, updates

    checkpoint = exports.write_checkpoint(
        tmp_path / "c", tmp_path, exports.adapter_tensors({f"{EXPERTS}.0.down_proj": (8, 8)})
    )
    adapter, shapes = Adapter(checkpoint / "vllm"), {f"{EXPERTS}.down_proj": (3, 8, 8)}
    with pytest.raises(UserError, match="is square for each expert"):
        updates(adapter, shapes, "")
    assert updates(adapter, shapes, "", lambda experts: False)
