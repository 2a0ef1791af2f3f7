"""What `bvpo expand` takes is what it says before it begins: memory, disk and files, to a tenth."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron_bvpo.growth import expansion
from megatron_bvpo.growth.layers import sizes_of
from megatron_bvpo.growth.memory_needed import GIB, LIBRARIES, needed
from megatron_bvpo.planning.model_shapes import SHIPPED
from tests.unit.grown_models import expand

pytest.importorskip("ot", reason="bvpo expand needs the package POT (extra rehearsal)")

COMMON = dict(vocab_size=64, num_key_value_heads=4, head_dim=128, dtype="bfloat16")
# A mixture takes what its attention takes, a dense model what the plan of its neurons takes.
MODELS = {
    # The 235B model with a quarter of its width, of its experts' and of its layers' number.
    "235B shrunken": dict(
        model_type="qwen3_moe",
        hidden_size=2048,
        num_hidden_layers=2,
        num_attention_heads=64,
        moe_intermediate_size=768,
        num_experts=8,
    ),
    "dense": dict(
        model_type="qwen3", hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=5120
    ),
}


def write_model(folder, config) -> None:
    """Random layers, each in a file of its own."""
    config = config | COMMON
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = sizes_of(config, "config.json").shapes()
    where = {}
    for number in range(config["num_hidden_layers"]):
        tensors = {f"model.layers.{number}.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        file = f"model-{number + 1:05d}-of-{config['num_hidden_layers']:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


# The command in a process of its own, which tells its largest moment; ru_maxrss would be this process's, too.
PEAK = """
import sys
from megatron_bvpo.cli import bvpo
code = bvpo(["expand", *sys.argv[1:]])
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(line.split()[1]) * 1024)
sys.exit(code)
"""


@pytest.mark.parametrize("name", MODELS)
def test_memory_disk_and_files_are_as_predicted(tmp_path, name):
    old, out = tmp_path / "old", tmp_path / "grown"
    write_model(old, MODELS[name])
    command = [sys.executable, "-c", PEAK, str(old), str(out), "--layers", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("peak ")[2])
    predicted = expansion.read_model(old, "0", 32)
    assert peak == pytest.approx(predicted.memory, rel=0.1)
    assert predicted.memory > 1.5 * LIBRARIES  # or libraries alone would be compared
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == sorted([*predicted.shards.old.values(), *predicted.shards.new.values()])
    assert sum(file.stat().st_size for file in files) == pytest.approx(predicted.shards.bytes, rel=1e-3)


def test_what_the_real_models_take():
    """docs/growth.md has these numbers."""
    takes = {}
    for file in SHIPPED.glob("*.json"):
        config = json.loads(file.read_text())
        takes[file.stem] = (needed(sizes_of(config, str(file)), 2) + LIBRARIES) / GIB
    assert takes["Qwen3-235B-A22B-Thinking-2507"] < 0.8
    assert takes["Qwen3-30B-A3B-Thinking-2507"] < 0.6
    assert takes["DeepSeek-R1-Distill-Qwen-7B"] == pytest.approx(7.0, rel=0.1)


def test_a_model_that_takes_more_than_allowed_is_refused_before_anything_is_written(tmp_path, capsys):
    write_model(tmp_path / "old", MODELS["dense"])
    assert expand(tmp_path / "old", tmp_path / "grown", "0", "--memory", 0.5) == 2
    said = capsys.readouterr().err
    assert "--memory: growing this model takes 0.8 GiB, and 0.5 are allowed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
