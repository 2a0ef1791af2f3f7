"""The files of configs/ as they are: headers, reasons, and the plan's verdict."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.planning.command import make_plan
from megatron_bvpo.planning.layout import Cluster
from megatron_bvpo.planning.memory import EMPTY_LENGTH

FOLDER = Path(__file__).resolve().parents[2] / "configs"
OTHERS = ("sampling_", "rounds_", "sweep_", "rehearsal_")  # no runs of swift rlhf
CONFIGS = sorted(file.stem for file in FOLDER.glob("*.yaml") if not file.stem.startswith(OTHERS))
EXPECTED = {
    "qwen3_235b_a22b_thinking_lora_4nodes": 4,
    "qwen3_235b_a22b_thinking_lora_8nodes": 8,
    "qwen3_30b_a3b_thinking_lora_1node": 1,
    "qwen3_30b_a3b_thinking_lora_2nodes": 2,
    "qwen3_30b_a3b_thinking_full_1node": 1,
    "qwen3_30b_a3b_thinking_full_2nodes": 2,
    "qwen3_30b_a3b_thinking_expanded": 1,
    "deepseek_r1_distill_qwen_1_5b": 1,
    "deepseek_r1_distill_qwen_7b": 1,
    "deepseek_r1_0528_qwen3_8b": 1,
}


def cluster_of(name: str) -> Cluster:
    """The machines that a file's header plans for."""
    if name == "rehearsal":
        return Cluster(1, 4, 1)
    return Cluster(EXPECTED[name], 8, 80)


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text()


def test_every_promised_run_has_a_file():
    assert set(CONFIGS) == {*EXPECTED, "rehearsal"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_header_says_what_the_plan_says(name):
    """For what, what it needs, the command, and its verdict to the letter."""
    head = text_of(name).split("\nrlhf_type")[0]
    assert re.search(r"^# For: ", head, re.M) and re.search(r"^# Needs: ", head, re.M)
    command = f"bvpo plan configs/{name}.yaml --nodes {EXPECTED[name]}"
    assert command in head
    plan = make_plan(str(FOLDER / f"{name}.yaml"), cluster_of(name))
    assert plan.fits
    assert f"#   {plan.verdict}\n" in head + "\n"


def test_the_rehearsal_passes_the_plan(tmp_path):
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    # The sizes of launch/rehearse.sh's model, whose weights nobody needs here.
    sizes = {name: p.default for name, p in inspect.signature(make_tiny_model).parameters.items()}
    renamed = {"num_hidden_layers": sizes["num_layers"], "num_experts_per_tok": sizes["experts_per_token"]}
    config = {**sizes, **renamed, "model_type": "qwen3_moe", "vocab_size": 151936, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    plan = make_plan(str(FOLDER / "rehearsal.yaml"), cluster_of("rehearsal"), model=str(tmp_path))
    assert plan.fits and plan.groups.dp == 1 and plan.groups.pp == 2
    assert f"#   {plan.verdict}\n" in text_of("rehearsal")


@pytest.mark.parametrize("name", EXPECTED)
def test_starting_values(name):
    values = yaml.safe_load(text_of(name))
    assert values["attention_backend"] == "auto"
    if EXPECTED[name] > 1:  # a pack takes the longest row: two traces and two empty ones
        assert values["packing"] and values["packing_length"] >= 2 * values["max_length"] + 2 * EMPTY_LENGTH
    if values["tuner_type"] == "lora":
        wanted = dict(lora_rank=16, lora_alpha=32, lr=2e-5, beta=0.075, target_modules="all-linear", bvpo_alpha="auto")
        assert {key: values[key] for key in wanted} == wanted
    if name.startswith("deepseek"):
        assert values["bvpo_alpha"] == 0.5 and values["max_length"] == 4096 and values["tuner_type"] == "full"


@pytest.mark.parametrize("name", EXPECTED)
def test_each_starting_value_has_its_reason(name):
    """Beside the value, on its line."""
    for line in text_of(name).splitlines():
        key = line.partition(":")[0]
        keys = ("bvpo_alpha", "beta", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "lr", "max_length")
        keys += ("global_batch_size", "micro_batch_size", "lr_warmup_fraction", "freeze_parameters_regex")
        keys += ("packing", "packing_length", "attention_backend")
        if key in keys:
            assert re.search(r"\s# \S", line), line
