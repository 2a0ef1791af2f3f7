"""What `bvpo expand` cannot do right it refuses before it writes: one line with file, field and remedy."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.grown_models import copy_of, expand, make_model

pytest.importorskip("ot", reason="bvpo expand needs the package POT (extra rehearsal)")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / kind, kind, num_hidden_layers=4) for kind in ("qwen3", "qwen3_moe")}


def change_tensor(model: Path, name: str, change) -> None:
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def drop_tensor(model: Path, name: str) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop(name)
    tensors = load_file(model / file)
    del tensors[name]
    save_file(tensors, model / file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def add_tensor(model: Path, name: str) -> None:
    file = max(model.glob("*.safetensors"))
    save_file(load_file(file) | {name: torch.ones(3)}, file, metadata={"format": "pt"})


def cut(model: Path) -> None:
    file = max(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def lose(model: Path) -> None:
    max(model.glob("*.safetensors")).unlink()


def spoil_table(model: Path, change) -> None:
    file = max(model.glob("*.safetensors"))
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8:end]))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


Q2 = "model.layers.2.self_attn.q_proj.weight"
# name: (what is done to a copy of the model, --layers, what is said)
FOLDERS = {
    "no such folder": (lambda m: m.rename(m.with_name("elsewhere")), "0", "MODEL: there is no such folder"),
    "no weights": (lambda m: [f.unlink() for f in m.glob("model*")], "0", "MODEL: holds no safetensors of a model"),
    "no config": (lambda m: (m / "config.json").unlink(), "0", "MODEL: holds no config.json; copy the model again"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "0", "config.json: cannot be read"),
    "half a download": (lose, "0", "the index names it and it is not there"),
    "a file that is cut": (cut, "0", "is no whole safetensors file"),
    "a tensor is missing": (lambda m: drop_tensor(m, Q2), "0", f"MODEL: {Q2} is missing; copy the model again"),
    "a tensor of another shape": (
        lambda m: change_tensor(m, Q2, lambda t: t[:-8]),
        "0",
        f"MODEL: {Q2} is [40, 32], and config.json says [48, 32]",
    ),
    "an unknown way back": (
        lambda m: add_tensor(m, "model.layers.3.mlp.adapter.weight"),
        "0",
        "model.layers.3.mlp.adapter.weight is not known, so that it may lead back into the residual stream",
    ),
    "layers behind the last": (
        lambda m: add_tensor(m, "model.layers.4.eh_proj.weight"),
        "0",
        "num_hidden_layers: says 4 layers, and the files hold layer 4",
    ),
    "integers": (lambda m: change_tensor(m, Q2, lambda t: t.to(torch.int8)), "0", f"MODEL: {Q2} is I8"),
    "two types": (
        lambda m: change_tensor(m, Q2, lambda t: t.bfloat16()),
        "0",
        "of its layer are F32; save the model in one type first",
    ),
    "no number": (
        lambda m: change_tensor(m, Q2, lambda t: t.index_fill(0, torch.tensor([3]), float("nan"))),
        "1,2",
        f"MODEL: {Q2} holds what is no number",
    ),
    "a table that is a list": (lambda m: spoil_table(m, lambda header: []), "0", "is no whole safetensors file"),
    "bytes that are not the shape's": (
        lambda m: spoil_table(m, lambda header: {k: v | {"shape": [7]} for k, v in header.items() if "shape" in v}),
        "0",
        "bytes, and its shape has others",
    ),
    "a link to nothing": (
        lambda m: (m / "vocab.json").symlink_to("../blobs/none"),
        "0",
        "vocab.json: is a link to nothing; download the model again",
    ),
    "a file instead of a folder": (lambda m: (m.rename(m.with_name("x")), m.write_text("")), "0", "MODEL: there is no"),
}
CONFIGS = {
    "an unknown kind": ({"model_type": "llama"}, "model_type: is 'llama'; what its layers add"),
    "no kind": ({"model_type": None}, "model_type: is None"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: the model is quantised; give the same"),
    "no number of layers": ({"num_hidden_layers": "4"}, "num_hidden_layers: is '4'; expected a whole number"),
    "fewer layers": ({"num_hidden_layers": 3, "layer_types": None}, "says 3 layers, and the files hold layer 3"),
    "more layers": ({"num_hidden_layers": 6, "layer_types": None}, "says 6 layers, and the files lack layer 4"),
    "windows": ({"use_sliding_window": True}, "use_sliding_window: some layers see a window of the text"),
    "layer types": ({"layer_types": ["full_attention"] * 3}, "layer_types: names 3 layers of 1 kinds"),
    "a number of layer types": ({"layer_types": 5}, "layer_types: is 5; expected a list of names"),
    "objects of layer types": ({"layer_types": [{}] * 4}, "layer_types: is [{}, {}, {}, {}]; expected a list of names"),
    "a thousand million layers": ({"num_hidden_layers": 10**9, "layer_types": None}, "and the files lack layer 4"),
    "no width": ({"hidden_size": None}, "hidden_size: is None; expected a whole number above 0"),
    "odd heads": ({"num_key_value_heads": 4}, "num_key_value_heads: 6 heads cannot share 4"),
    "grown already": ({"bvpo_new_layers": [2]}, "bvpo_new_layers: the model is grown already"),
}
LAYERS = {
    "no list": ("upper", "--layers: 'upper' is no list of whole numbers; give upper-half, or numbers from 0 to 2"),
    "empty": ("", "--layers: '' is no list of whole numbers"),
    "behind the last": ("3", "--layers: there is no place between layers 3 and 4: the model's layers are 0 to 3"),
    "before the first": ("-1", "--layers: there is no place between layers -1 and 0"),
    "one grown twice": ("1,2,1", "--layers: names 1 twice, and one new layer goes between two neighbours"),
    "half a number": ("1.5", "--layers: '1.5' is no list of whole numbers"),
}


def refused(capsys, model, out, layers, said, *more) -> None:
    before = sorted(out.parent.iterdir())
    assert expand(model, out, layers, *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("megatron-bvpo: error: ")]
    assert len(errors) == 1 and said in errors[0], lines
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(models, tmp_path, capsys, case):
    spoil, layers, said = FOLDERS[case]
    model = copy_of(models["qwen3"], tmp_path / "model")
    spoil(model)
    refused(capsys, model, tmp_path / "grown", layers, said)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(models, tmp_path, capsys, case):
    changes, said = CONFIGS[case]
    model = copy_of(models["qwen3"], tmp_path / "model", **changes)
    refused(capsys, model, tmp_path / "grown", "0", said)


@pytest.mark.parametrize("field", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_layers_of_two_kinds(models, tmp_path, capsys, field):
    model = copy_of(models["qwen3_moe"], tmp_path / "model", **field)
    refused(capsys, model, tmp_path / "grown", "0", f"{next(iter(field))}: some layers have experts and some do not")


@pytest.mark.parametrize("case", LAYERS)
def test_places(models, tmp_path, capsys, case):
    layers, said = LAYERS[case]
    refused(capsys, models["qwen3"], tmp_path / "grown", layers, said)


def test_a_model_of_one_layer(tmp_path, capsys):
    model = make_model(tmp_path / "model", "qwen3", num_hidden_layers=1)
    refused(capsys, model, tmp_path / "grown", "upper-half", "--layers: a model of 1 layer has no neighbours")


def test_a_grown_model_is_not_grown_again(models, tmp_path, capsys):
    assert expand(models["qwen3"], tmp_path / "grown", "1") == 0
    capsys.readouterr()
    remedy = "grow the model qwen3 at all its places at once"
    refused(capsys, tmp_path / "grown", tmp_path / "again", "1", remedy)


def test_the_new_folder(models, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    refused(capsys, models["qwen3"], tmp_path / "there", "1", "OUT: ")
    refused(capsys, models["qwen3"], models["qwen3"], "1", "is there already; give a new folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "nowhere").symlink_to("none")
    for link in ("link", "nowhere"):
        refused(capsys, models["qwen3"], tmp_path / link, "1", f"OUT: {tmp_path / link} is there already")
    assert expand(models["qwen3"], tmp_path / "no/such/folder", "1") == 2
    assert f"OUT: there is no folder {tmp_path / 'no/such'}; make it first" in capsys.readouterr().err


@pytest.mark.parametrize("metadata", ["none", ["none"], None])
def test_an_index_whose_metadata_is_none(models, tmp_path, metadata):
    """Nobody reads it, and the grown model's is whole."""
    model = copy_of(models["qwen3"], tmp_path / "model")
    file = model / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metadata": metadata}))
    assert expand(model, tmp_path / "grown", "1") == 0
    assert json.loads((tmp_path / "grown" / file.name).read_text())["metadata"].keys() == {"total_size"}


def test_too_little_room(models, tmp_path, capsys, monkeypatch):
    from megatron_bvpo.export import new_folder

    full = new_folder.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda folder: full)
    refused(capsys, models["qwen3"], tmp_path / "grown", "1", "are free; give a folder on another disk")


def test_a_disk_that_is_full_half_way(models, tmp_path):
    """A limit on the size of files stands for it: another user has taken the room meanwhile."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    code = "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "expand", models["qwen3"], tmp_path / "grown", "--layers", "1"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "OUT: cannot be read or written: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    refused(capsys, models["qwen3"], tmp_path / "grown", "1", "pip install POT, or 'megatron-bvpo[rehearsal]'")


@pytest.mark.parametrize("given", ["0", "-3", "nan", "much"])
def test_memory_that_is_none(models, tmp_path, capsys, given):
    with pytest.raises(SystemExit) as stopped:
        expand(models["qwen3"], tmp_path / "grown", "1", f"--memory={given}")
    assert stopped.value.code == 2 and "is no number above 0" in capsys.readouterr().err
