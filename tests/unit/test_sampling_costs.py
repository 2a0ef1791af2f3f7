"""The estimate of a sampling job against closed forms, and what the shipped files say of themselves."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cli import bvpo
from megatron_bvpo.errors import UserError
from megatron_bvpo.planning import sampling_costs as sc
from megatron_bvpo.planning.layout import Cluster
from megatron_bvpo.planning.model_shapes import model_shape
from megatron_bvpo.sampling.asking.job_file import read_job

FOLDER = Path(__file__).resolve().parents[2] / "configs"
NODES = {
    "sampling_qwen3_235b_a22b_thinking": 4,
    "sampling_qwen3_30b_a3b_thinking": 1,
    "sampling_deepseek_r1_distill_qwen_7b": 1,
}
DENSE, MIXTURE = model_shape("DeepSeek-R1-Distill-Qwen-7B"), model_shape("Qwen3-235B-A22B-Thinking-2507")
JOB = sc.SamplingJob(
    prompts=1000,
    samples=4,
    modes=("thinking", "empty"),
    tokens={"thinking": 2000.0, "empty": 500.0, "short": 500.0},
    concurrency=64,
    gpus_an_engine=1,
    engines_a_node=8,
    most_running=256,
    utilization=0.9,
)


def test_every_sampling_file_is_known():
    assert {file.stem for file in FOLDER.glob("sampling_*.yaml")} == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_a_header_says_what_the_plan_says(name, capsys):
    text = (FOLDER / f"{name}.yaml").read_text()
    head = text.split("\nprompts:")[0]
    assert re.search(r"^# For: ", head, re.M) and re.search(r"^# Needs: ", head, re.M)
    command = f"bvpo plan configs/{name}.yaml --nodes {NODES[name]}"
    assert command in head and f"launch/sample.sbatch configs/{name}.yaml" in head
    assert bvpo(["plan", str(FOLDER / f"{name}.yaml"), "--nodes", str(NODES[name])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"#   {said[1]}\n" in head + "\n" and "an estimate" in said[1]


def test_the_paper_s_settings_stand_in_its_file():
    values, _ = read_job(str(FOLDER / "sampling_deepseek_r1_distill_qwen_7b.yaml"))
    assert (values["samples"], values["temperature"], values["max_tokens"]) == (5, 0.8, 4096)
    assert values["modes"] == ["thinking", "empty"]


@pytest.mark.parametrize("name", NODES)
def test_an_engine_s_context_holds_a_prompt_and_an_answer(name):
    values, engine = read_job(str(FOLDER / f"{name}.yaml"))
    assert engine["max_model_len"] >= values["max_tokens"] + 4096
    assert engine["tensor_parallel_size"] * engine.get("data_parallel_size", 1) == 8
    assert yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["seed"] == 0


def test_few_sequences_cost_the_reading_of_the_weights():
    """One sequence of a dense model: the weights that a token meets and its own keys, over the memory's rate."""
    one = dataclasses.replace(JOB, concurrency=8)
    costs = sc.sampling_costs(DENSE, one, Cluster(1, 8, 80))
    assert costs.running == 1
    weights = 2 * (DENSE.total_parameters - DENSE.vocab * DENSE.hidden)  # the embedding is looked up, not read
    context = sc.PROMPT + (2000**2 + 500**2) / 2500 / 2
    kv = 2 * DENSE.layers * DENSE.kv_heads * DENSE.head_dim * 2 * context
    rate = 8 * 0.6 * 3.35e12 / (weights + kv)
    assert costs.rate[1] == pytest.approx(rate, rel=1e-3)  # norms and biases are not counted as read
    assert costs.hours[0] == pytest.approx(1000 * 4 * 2500 / costs.rate[1] / 3600)


def test_many_sequences_are_bound_by_products():
    many = dataclasses.replace(
        JOB, concurrency=10**6, most_running=10**6, prompts=10**6, tokens={**JOB.tokens, "thinking": 8.0, "empty": 8.0}
    )
    costs = sc.sampling_costs(DENSE, many, Cluster(1, 8, 80))
    flops = 2 * (DENSE.active_matrices + DENSE.vocab * DENSE.hidden)
    assert costs.rate[1] == pytest.approx(8 * 0.6 * sc.PEAK_FLOPS / flops)


def test_experts_are_read_as_tokens_meet_them():
    experts = MIXTURE.layers * MIXTURE.experts * MIXTURE.expert_matrices
    rest = MIXTURE.layers * MIXTURE.layer_matrices + MIXTURE.vocab * MIXTURE.hidden
    assert sc.weights_touched(MIXTURE, 1) == pytest.approx(rest + experts * 8 / 128)
    assert sc.weights_touched(MIXTURE, 10**4) == pytest.approx(rest + experts)


def test_keys_and_values_are_copied_where_there_are_more_gpus_than_heads():
    assert MIXTURE.kv_heads == 4
    assert sc.kv_elements(MIXTURE, 8) == 2 * sc.kv_elements(MIXTURE, 4) == 2 * sc.kv_elements(MIXTURE, 2)


def test_a_model_that_does_not_fit_is_said(tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text("model: Qwen3-235B-A22B-Thinking-2507\nmodes: [thinking]\nengine: {tensor_parallel_size: 4}\n")
    assert bvpo(["plan", str(file)]) == 1
    assert "DOES NOT FIT: 438 GiB of weights on 4 GPU(s)" in capsys.readouterr().out
    file.write_text(file.read_text().replace("4}", "4, quantization: fp8}"))
    assert bvpo(["plan", str(file)]) == 0
    assert "4 GPU(s) a node are idle" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, told",
    [
        ("modes: [thinking]\nengine: 3\n", "engine: is no mapping"),
        ("modes: [loud]\nmodel: Qwen3-30B-A3B-Thinking-2507\n", "modes: 'loud' is no mode"),
        ("modes: [thinking]\nsamples: many\nmodel: Qwen3-30B-A3B-Thinking-2507\n", "samples: is 'many'"),
        ("modes: [thinking]\nmodel: Qwen3-30B-A3B-Thinking-2507\nengine: {tensor_parallel_size: 16}\n", "16 GPU"),
    ],
)
def test_a_job_that_cannot_be_planned(tmp_path, capsys, text, told):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    assert bvpo(["plan", str(file)]) == 2
    error = capsys.readouterr().err
    assert told in error and str(file) in error and "Traceback" not in error


def test_unknown_model_is_no_traceback(tmp_path):
    with pytest.raises(UserError):
        model_shape("nobody/knows-it")
