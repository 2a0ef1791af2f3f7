"""Every YAML file of configs/: it parses through the real arguments, and runs two steps on eight ranks.

For the two steps the model is shrunk to four layers and eight experts, and what is too large for eight CPU ranks is
halved until it fits: experts' parallelism, and the larger of tensor and context parallelism. The pipeline, its virtual
stages, sequence parallelism, recomputation, tuner, batch of one row and everything else stay as they are. Only with
`--whole-matrix`: it takes minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.planning.model_shapes import model_shape, shipped_names
from tests.distributed.cells import CPU_FLAGS, ROOT, Cell, run_cells
from tests.unit.grown_models import expand
from tests.unit.test_shipped_configs import CONFIGS, cluster_of

RANKS = 8
HOOK, HOOK_ARGS = (
    "tests.distributed.recorders:record_first_step",
    {"gradients": False, "lora_scale": 0},
)  # saves nothing
# Settings of a GPU that a CPU run replaces (CPU_FLAGS), and what a test gives itself.
OURS = {"rlhf_type", "megatron", "model", "dataset", "output_dir", "num_train_epochs", "save_steps", "eval_steps"}
OURS |= {"lr", "lr_warmup_fraction", "lr_decay_style", "train_iters"}
TYPES = {"qwen3_moe": ("qwen3_moe", "qwen3_thinking"), "qwen3": ("qwen3", "qwen3_thinking"), "qwen2": ("qwen2", "qwen")}


def settings_of(name: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


def fitted(values: dict, ranks: int = RANKS) -> dict:
    """`values` with group sizes halved until `ranks` ranks and a tiny model can have them."""
    found = dict(values)

    def size(key: str) -> int:
        return found.get(f"{key}_parallel_size", 1)

    while size("expert_model") * size("pipeline_model") > ranks:
        found["expert_model_parallel_size"] //= 2
    while size("tensor_model") * size("pipeline_model") * size("context") > ranks:
        larger = "tensor_model" if size("tensor_model") >= size("context") else "context"
        found[f"{larger}_parallel_size"] //= 2
    data = ranks // (size("tensor_model") * size("pipeline_model") * size("context"))
    found["global_batch_size"] = values["micro_batch_size"] * data * max(2, size("pipeline_model"))
    found["max_length"] = 512
    if values.get("packing"):
        found["packing_length"] = 800  # two of the tiny rows
    return found


def argv_of(name: str, model: Path, rows: Path) -> list[str]:
    values = fitted(settings_of(name))
    kind = json.loads((model / "config.json").read_text())["model_type"]
    model_type, template = TYPES[kind]
    argv = []
    for key, value in values.items():
        if key not in OURS:
            argv += [f"--{key}", *(str(value).split() if key == "target_modules" else [str(value)])]
    bf16 = "--torch_dtype bfloat16 --bf16 true".split() if values.get("optimizer_cpu_offload") else []
    recompute = [f for key in ("granularity", "method", "num_layers") for f in recompute_flags(values, key)]
    return [
        *argv,
        *CPU_FLAGS,
        *recompute,  # last, because CPU_FLAGS turn it off
        *("--attention_backend", values["attention_backend"]),
        *bf16,  # as well; an optimizer on the host takes no float32 model
        *f"--model {model} --model_type {model_type} --template {template} --dataset {rows}".split(),
        # A file's learning rate moves a loss of ln 2 by less than logging.jsonl shows.
        *"--lr 0.01 --lr_decay_style constant --train_iters 2".split(),
        *"--save_steps 1000 --eval_steps 1000 --split_dataset_ratio 0".split(),
    ]


def recompute_flags(values: dict, key: str) -> list[str]:
    name = f"recompute_{key}"
    return [f"--{name}", str(values[name])] if name in values else []


@pytest.fixture(scope="module")
def tiny(workshop, tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each kind, by config.json's model_type."""
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    shutil.copytree(workshop.dense, folder)
    make_qwen2(folder)
    return {"qwen3_moe": workshop.moe, "qwen3": workshop.dense, "qwen2": folder}


def make_qwen2(folder: Path) -> None:
    """Turn a copy of the tiny Qwen3 into a Qwen2 of the same sizes: biases on q, k and v, no norms per head."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    keys = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    keys += ("intermediate_size", "tie_word_embeddings", "eos_token_id", "pad_token_id", "max_position_embeddings")
    torch.manual_seed(0)
    small = transformers.Qwen2Config(**{k: config[k] for k in keys}, bos_token_id=None, dtype="float32")
    for old in folder.glob("*.safetensors"):
        old.unlink()
    transformers.Qwen2ForCausalLM(small).to(torch.float32).save_pretrained(folder)


def test_all_parse_through_the_real_arguments(workshop, tmp_path):
    """In one process, with the models' full-size config.json and as many ranks as the file's header says."""
    specs = []
    for name in CONFIGS:
        values = settings_of(name)
        if name == "rehearsal":
            model = workshop.moe
        else:
            shape_file = shipped_names()[values["model"].rsplit("/", 1)[-1].lower()]
            kind = json.loads(shape_file.read_text())["model_type"]
            model = tmp_path / shape_file.stem
            shutil.copytree(workshop.moe if kind == "qwen3_moe" else workshop.dense, model, dirs_exist_ok=True)
            architecture = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(
                kind, "Qwen2ForCausalLM"
            )
            config = {**json.loads(shape_file.read_text()), "architectures": [architecture], "dtype": "bfloat16"}
            (model / "config.json").write_text(json.dumps(config))
            assert model_shape(str(model)).layers == config["num_hidden_layers"]
        values |= dict(
            model=str(model), model_type=TYPES[json.loads((model / "config.json").read_text())["model_type"]][0]
        )
        values |= dict(dataset=str(workshop.train), output_dir=str(tmp_path / "out" / name), template="qwen3_thinking")
        specs.append({"name": name, "values": values, "ranks": cluster_of(name).ranks})
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(specs))
    env = {**os.environ, "BVPO_REHEARSAL": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.parse_configs", str(spec)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parsed = json.loads((tmp_path / "parsed.json").read_text())
    assert set(parsed) == set(CONFIGS)
    for name, found in parsed.items():
        values = settings_of(name)
        assert found["beta"] == values["beta"]
        assert found["rlhf_type"] == "bvpo"
        assert found["ranks"] == cluster_of(name).ranks


def test_two_steps_in_the_layout(tiny, workshop, tmp_path, request):
    if not request.config.getoption("--whole-matrix"):
        pytest.skip("takes minutes: --whole-matrix runs it")
    cells = []
    for name in CONFIGS:
        kind = "qwen3_moe" if name == "rehearsal" else model_shape(settings_of(name)["model"]).kind
        model = tiny[kind]
        if settings_of(name).get("bvpo_new_layers_only"):
            model = tmp_path / f"{kind}-grown"
            assert expand(tiny[kind], model) == 0
        argv = argv_of(name, model, workshop.train)
        cells.append(Cell(name, argv, hook=HOOK, hook_args=HOOK_ARGS))
    for name, result in run_cells(RANKS, cells, tmp_path).items():
        losses = result.steps("loss")
        assert len(losses) == 2, name
        assert all(0 < loss < 10 for loss in losses), (name, losses)
        assert losses[0] != losses[1], f"{name}: nothing was learnt"
