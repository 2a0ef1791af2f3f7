"""What a checkpoint keeps of names and rates: a `target_regex` as a list, and its own schedule, which is told."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from tests.distributed.forks import zygotes
from tests.distributed.test_bad_input import flags

pytestmark = pytest.mark.slow


def losses(folder) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_a_pattern_is_saved_as_the_names_that_it_matches(workshop, tmp_path):
    out = tmp_path / "out"
    given = {"target_regex": r".*(experts\.linear_fc1|linear_proj)", "train_iters": 2, "save_steps": 1}
    given |= {"logging_steps": 1, "merge_lora": "false"}
    zygotes().run(out, flags(workshop, **given)).require_success()
    adapter = out / "checkpoint-1"
    fused = json.loads((adapter / "adapter_config.json").read_text())  # peft's form: experts are parameters there
    assert fused["target_modules"] == ["o_proj"]
    assert [name.rpartition(".")[2] for name in fused["target_parameters"]] == ["gate_up_proj"]
    saved = json.loads((adapter / "vllm" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(saved) == ["gate_proj", "o_proj", "up_proj"]
    with safe_open(str(adapter / "vllm" / "adapter_model.safetensors"), framework="pt") as file:
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in file.keys()} == set(saved)
    whole = losses(out)
    more = flags(workshop, **given, mcore_adapter=out / "checkpoint-1", finetune="false")
    zygotes().run(out, more).require_success()
    assert losses(out)[len(whole) :] == whole[1:] and len(whole) == 2


def test_a_rate_that_the_checkpoint_wins_over_is_told(workshop, tmp_path):
    """Megatron takes the schedule from the checkpoint, whatever the flags say."""
    out = tmp_path / "out"
    given = {"train_iters": 1, "lr": 1e-4, "save_safetensors": "false"}
    run = zygotes().run(out, flags(workshop, **given)).require_success()
    assert "The checkpoint's" not in run.text
    more = {**given, "train_iters": 2, "lr": 5e-5, "mcore_adapter": out / "checkpoint-1", "finetune": "false"}
    run = zygotes().run(out, flags(workshop, **more)).require_success()
    assert "The checkpoint's max_lr goes on, 0.0001, and not this run's 5e-05." in run.text
    assert "The checkpoint's lr_decay_steps goes on, 4, and not this run's 8." in run.text
