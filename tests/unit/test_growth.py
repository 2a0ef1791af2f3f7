"""`bvpo expand`: the grown model is the old one to the last bit, and its files are the old ones with new layers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bvpo.export.tensor_files import ModelFiles, read_entries
from megatron_bvpo.growth.layer_choice import new_numbers, places
from tests.unit.grown_models import KINDS, copy_of, expand, logits, make_model

pytest.importorskip("ot", reason="bvpo expand needs the package POT (extra rehearsal)")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind → (old model, grown model)."""
    folder = tmp_path_factory.mktemp("growth")
    found = {}
    for kind in KINDS:
        old = make_model(folder / kind, kind, num_hidden_layers=4)
        assert expand(old, folder / f"{kind}-grown") == 0
        found[kind] = old, folder / f"{kind}-grown"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_old_models_to_the_last_bit(models, kind, dtype):
    old, grown = models[kind]
    assert torch.equal(logits(grown, dtype), logits(old, dtype))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3", "self_attn.o_proj.weight"),
        ("qwen2", "mlp.down_proj.weight"),
        ("qwen3_moe", "mlp.experts.4.down_proj.weight"),
        ("qwen2_moe", "mlp.shared_expert.down_proj.weight"),
    ],
)
def test_a_way_back_that_is_left_open_would_show(models, tmp_path, kind, name):
    """A public script left the experts' output as it was, and its grown model was another one."""
    old, grown = models[kind]
    spoilt = copy_of(grown, tmp_path / "spoilt")
    number = json.loads((grown / "config.json").read_text())["bvpo_new_layers"][-1]
    full = f"model.layers.{number}.{name}"
    file = ModelFiles(spoilt, "MODEL").entries[full].file
    tensors = load_file(file)
    assert not tensors[full].any()
    tensors[full] += 1e-2
    save_file(tensors, file, metadata={"format": "pt"})
    assert not torch.equal(logits(spoilt), logits(old))


@pytest.mark.parametrize("kind", KINDS)
def test_old_tensors_are_the_same_to_the_byte(models, kind):
    """Under their new numbers, in their own type; the new layers' are the upper neighbour's in shape and type."""
    old, grown = (ModelFiles(folder, "MODEL") for folder in models[kind])
    numbers, new = new_numbers(places("upper-half", 4), 4)
    left = dict(grown.entries)
    for name, entry in old.entries.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(numbers[int(parts[2])])
        there = left.pop(".".join(parts))
        assert (there.dtype, there.shape) == (entry.dtype, entry.shape)
        assert bytes_of(there) == bytes_of(entry), name
    for place, number in new.items():
        for name, entry in old.entries.items():
            if name.startswith(f"model.layers.{place + 1}."):
                there = left.pop(name.replace(f".{place + 1}.", f".{number}.", 1))
                assert (there.dtype, there.shape) == (entry.dtype, entry.shape)
    assert not left


def bytes_of(entry) -> bytes:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.end - entry.start)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_whole(models, kind):
    old, grown = models[kind]
    index = json.loads((grown / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in grown.glob("*.safetensors") for name in read_entries(file)}
    assert index["weight_map"] == held
    entries = ModelFiles(grown, "MODEL").entries.values()
    assert index["metadata"]["total_size"] == sum(e.end - e.start for e in entries)
    assert index["metadata"]["total_parameters"] == sum(e.parameters for e in entries)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (grown, old))
    assert config.pop("num_hidden_layers") == 6 and config.pop("bvpo_new_layers") == [2, 4]
    if "layer_types" in before:
        assert config.pop("layer_types") == ["full_attention"] * 6
    assert config == {key: value for key, value in before.items() if key in config}
    assert (grown / "generation_config.json").read_bytes() == (old / "generation_config.json").read_bytes()
    assert (grown / "tokenizer.json").is_file()
    note = json.loads((grown / "expansion.json").read_text())
    assert note["model"] == old.name and note["bvpo_new_layers"] == [2, 4] and note["layers_before"] == 4
    assert [layer["between_old_layers"] for layer in note["new_layers"]] == [[1, 2], [2, 3]]
    assert any("o_proj" in name for name in note["zeroed"]) and "down_proj" in note["zeroed"][0]


def test_a_model_in_bfloat16_stays_one(tmp_path):
    old = make_model(tmp_path / "old", "qwen3", torch.bfloat16)
    assert expand(old, tmp_path / "grown", "0,3") == 0
    assert {entry.dtype for entry in ModelFiles(tmp_path / "grown", "MODEL").entries.values()} == {"BF16"}
    assert json.loads((tmp_path / "grown/config.json").read_text())["bvpo_new_layers"] == [1, 5]
    assert torch.equal(logits(tmp_path / "grown", torch.bfloat16), logits(old, torch.bfloat16))


def test_a_single_file_becomes_an_indexed_one(tmp_path):
    """As tiny models and those of below 5 GB are saved."""
    old = make_model(tmp_path / "old", "qwen3")
    tensors = {name: tensor for file in old.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in old.glob("model*"):
        file.unlink()
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    assert expand(old, tmp_path / "grown", "1") == 0
    assert sorted(file.name for file in (tmp_path / "grown").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert torch.equal(logits(tmp_path / "grown"), logits(old))


@pytest.mark.parametrize(
    ("given", "layers", "found"),
    [
        ("upper-half", 48, list(range(23, 47))),
        ("upper-half", 94, list(range(46, 93))),
        ("upper-half", 5, [2, 3]),
        ("upper-half", 2, [0]),
        ("3, 1", 5, [1, 3]),
    ],
)
def test_places(given, layers, found):
    assert places(given, layers) == found
    assert len(places("upper-half", layers)) == layers // 2


def test_numbers_of_a_grown_model():
    old, new = new_numbers([1, 2], 4)
    assert old == {0: 0, 1: 1, 2: 3, 3: 5} and new == {1: 2, 2: 4}


def test_what_the_command_says(models, tmp_path, capsys):
    old, _ = models["qwen3_moe"]
    assert expand(old, tmp_path / "grown", "0,2") == 0
    said = capsys.readouterr().out
    assert "4 layers become 6; new are 1, 4" in said
    assert f"--model {tmp_path / 'grown'} --tuner_type full --bvpo_new_layers_only true" in said
