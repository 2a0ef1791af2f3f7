"""The literal commands, as a person types them: the same run by four ways, each through its own launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.cells import CPU_FLAGS, ROOT
from tests.unit.cluster_ports import free_pair

BIN = Path(sys.executable).parent
ALPHA = 0.3


def common(workshop, output: Path) -> list[str]:
    run = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        f"--output_dir {output} --tuner_type lora --lora_rank 4 --lora_dropout 0 --lr 1e-3 --micro_batch_size 2 "
        "--global_batch_size 4 --train_iters 2 --logging_steps 1 --max_length 512 --save_safetensors false "
        "--no_save_optim true"
    )
    return [*run.split(), *CPU_FLAGS]


def as_yaml(flags: list[str], path: Path) -> Path:
    pairs = zip(flags[::2], flags[1::2], strict=True)
    path.write_text("".join(f"{name.removeprefix('--')}: {value}\n" for name, value in pairs))
    return path


def run(command: list[str], **environment: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("BVPO_")}
    env |= {"BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1", "PATH": f"{BIN}:{env['PATH']}"}
    env["MASTER_PORT"] = str(free_pair())
    done = subprocess.run(
        command,
        env=env | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def logs(workshop, runs_folder) -> dict[str, list[dict]]:
    folder = runs_folder
    ours = ["--bvpo_alpha", str(ALPHA)]
    bvpo = ["--rlhf_type", "bvpo", *ours]
    plugin = ROOT / "plugins" / "megatron_bvpo_plugin.py"
    yaml = as_yaml([*common(workshop, folder / "yaml"), *bvpo], folder / "run.yaml")
    flags = [*common(workshop, folder / "plugin"), "--rlhf_type", "dpo", "--external_plugins", str(plugin)]
    commands = {
        "swift": ["swift", "rlhf", "--megatron", *common(workshop, folder / "swift"), *bvpo],
        "yaml": ["swift", "rlhf", str(yaml)],
        "megatron": ["megatron", "rlhf", *common(workshop, folder / "megatron"), *bvpo],
        "plugin": ["megatron", "rlhf", *flags],
        "dpo": ["swift", "rlhf", "--megatron", *common(workshop, folder / "dpo"), "--rlhf_type", "dpo"],
    }
    environments = {"plugin": {"BVPO_ALPHA": str(ALPHA)}}
    with ThreadPoolExecutor(2) as pool:  # a core each
        list(pool.map(lambda name: run(commands[name], **environments.get(name, {})), commands))
    return {
        name: [json.loads(line) for line in (folder / name / "logging.jsonl").read_text().splitlines()]
        for name in commands
    }


def test_a_run_leaves_its_picture_and_its_versions(logs, runs_folder):
    assert (runs_folder / "swift" / "images" / "bvpo.png").stat().st_size > 10_000
    for name in ("swift", "plugin"):
        assert json.loads((runs_folder / name / "versions.json").read_text())["ms-swift"]


@pytest.mark.parametrize("name", ["yaml", "megatron", "plugin"])
def test_all_ways_give_the_same_run(logs, name):
    keys = ("loss", "loss/trace", "loss/empty", "logps/chosen", "empty/rewards/margins", "alpha", "grad_norm")
    for ours, literal in zip(logs[name][:2], logs["swift"][:2], strict=True):
        assert {k: ours[k] for k in keys} == {k: literal[k] for k in keys}
    assert logs[name][0]["alpha"] == pytest.approx(ALPHA)


def test_dpo_with_megatron_is_ms_swifts_own(logs):
    """Its trace pairs are ours, and it knows no empty stream."""
    assert "loss/empty" not in logs["dpo"][0] and "alpha" not in logs["dpo"][0]
    assert logs["dpo"][0]["logps/chosen"] == pytest.approx(logs["swift"][0]["logps/chosen"], rel=1e-5)
