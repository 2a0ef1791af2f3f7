"""What `bvpo export` refuses, with one line and nothing written."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bvpo.errors import UserError
from tests.unit import exports
from tests.unit.exports import EXPERTS, PREFIX, RANK, Q, export, write_trained


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
