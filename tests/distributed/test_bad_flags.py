"""Mistakes in flags, layouts and checkpoints, through the command line: one clear message, exit code 2, no stack trace.

They are told by the ranks, before a model is loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.forks import zygotes
from tests.distributed.short_runs import assert_told, flags

pytestmark = pytest.mark.slow

# case: (flags, ranks that are claimed, message)
FLAGS = {
    "alpha above 1": (
        {"bvpo_alpha": 1.5},
        1,
        r"--bvpo_alpha: alpha is '1.5'; expected a number in \[0, 1\], or auto. .*",
    ),
    "alpha below 0": ({"bvpo_alpha": -0.1}, 1, "--bvpo_alpha: alpha is '-0.1'; .*"),
    "alpha NaN": ({"bvpo_alpha": "nan"}, 1, "--bvpo_alpha: alpha is 'nan'; .*"),
    "alpha is a word": ({"bvpo_alpha": "half"}, 1, "--bvpo_alpha: alpha is 'half'; .*"),
    "alpha_prior": ({"bvpo_alpha_prior": 2}, 1, r"--bvpo_alpha_prior: is 2.0; expected a number in \[0, 1\].*"),
    "kappa": ({"bvpo_kappa": 0}, 1, r"--bvpo_kappa: is 0.0; expected a number in \(0, 1\].*"),
    "probe_interval": ({"bvpo_probe_interval": 0}, 1, "--bvpo_probe_interval: is 0; expected 1 or more.*"),
    "an unknown flag": ({"bvpo_alfa": 0.5}, 1, "--bvpo_alfa: no such flag; did you mean --bvpo_alpha.*"),
    "a wrong choice": ({"bvpo_empty": "drop"}, 1, "--bvpo_empty: invalid choice: 'drop' .*strip.*require.*"),
    "a rate that is none": ({"lr": "fast"}, 1, "--lr: invalid float value: 'fast'"),
    "loss_type": ({"loss_type": "dpo"}, 1, "--loss_type: loss_type is 'dpo'; BVPO knows sigmoid, .*"),
    "beta": ({"beta": -1}, 1, "--beta: beta is -1.0; it must be above 0.*"),
    "label_smoothing": ({"label_smoothing": 0.7}, 1, r"--label_smoothing: .* is 0.7; it must be in \[0, 0.5\).*"),
    "a filled empty block": (
        {"bvpo_empty_block": "<think>hm</think>"},
        1,
        "--bvpo_empty_block: an empty trace must hold nothing .* found 'hm' .*",
    ),
    "another optimizer": ({"optimizer": "muon"}, 1, "--optimizer: optimizer is 'muon': .* use --optimizer adam"),
    "ms-swift's own rules": (
        {"apply_wd_to_qk_layernorm": "true"},
        1,
        r"apply_wd_to_qk_layernorm is only supported .* \(.*megatron_args.py:\d+\)",
    ),
    "no data": ({"dataset": None}, 1, ".*Please input the training dataset. .*"),
    "no such model": ({"model": "/no/such/model"}, 1, "/no/such/model: --model: no such folder; check the path"),
    "TP of the heads": (
        {"tensor_model_parallel_size": 3, "sequence_parallel": "true"},
        3,
        r"--tensor_model_parallel_size: 8 attention heads cannot be split over TP 3. TP can be 1, 2, 4, 8.*|.*TP 3.*",
    ),
    "TP of the ranks": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": "true"},
        3,
        "--tensor_model_parallel_size: 3 ranks cannot be split into TP 2 × PP 1 × CP 1 = 2; start a multiple of 2 .*",
    ),
    "PP of the layers": (
        {"pipeline_model_parallel_size": 3},
        3,
        "--pipeline_model_parallel_size: 4 layers cannot be split evenly over 3 .* PP can be 1, 2, 4, .*",
    ),
    "EP of the experts": (
        {"expert_model_parallel_size": 3, "global_batch_size": 3},
        3,
        "--expert_model_parallel_size: 8 experts cannot be split over EP 3. EP can be 1, 2, 4, 8",
    ),
    "EP of the ranks": (
        {"expert_model_parallel_size": 2, "global_batch_size": 3},
        3,
        "--expert_model_parallel_size: 3 ranks cannot be split into expert TP 1 × EP 2 × PP 1 = 2. EP can be 1, 3 here",
    ),
    "MoE with TP, no SP": (
        {"tensor_model_parallel_size": 2},
        2,
        "--sequence_parallel: a mixture of experts with TP 2 needs sequence parallelism; add --sequence_parallel true",
    ),
    "VPP with few micro-batches": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "global_batch_size": 1},
        2,
        "--global_batch_size: 1 micro-batches a step cannot fill 2 pipeline stages .* use a multiple of 2",
    ),
    "the global batch": (
        {"global_batch_size": 5},
        2,
        "--global_batch_size: global batch 5 is not a multiple of micro batch 1 × data parallel 2 = 2; use 4",
    ),
    "more than there is": (
        {"global_batch_size": 32, "train_iters": None, "num_train_epochs": 1},
        1,
        ".*16 rows do not fill .* 32.*",
    ),
    "all rows too long": (
        {"max_length": 12},
        1,
        r".*train.jsonl: --max_length: no row is left: 16 longer than .* 12. .*",
    ),
    "a loss scale": ({"loss_scale": "default"}, 1, "--loss_scale: .* is 'default': BVPO counts the two responses, .*"),
    "truncation into pieces": (
        {"truncation_strategy": "split"},
        1,
        "--truncation_strategy: .* is 'split': a piece .* right or left; .*",
    ),
    "all frozen": (
        {"tuner_type": "full", "freeze_parameters_ratio": 1.0},
        1,
        "--freeze_parameters_ratio: .* is 1.0: every parameter is frozen, so nothing would be trained; .*",
    ),
    "no length": ({"train_iters": None}, 1, "--num_train_epochs: is missing, and so is train_iters: .*"),
    "two lengths": ({"num_train_epochs": 1}, 1, "--train_iters: is 1, and --num_train_epochs 1 would win over it; .*"),
    "a name cut short": (
        {"train_iters": None, "train_iter": 1},
        1,
        "--train_iter: no such flag; did you mean --train_.*",
    ),
    "a stream without an end": (
        {"streaming": "true", "train_iters": None, "num_train_epochs": 1},
        1,
        "--train_iters: is missing, and a stream has no end .*",
    ),
    "a stream with nothing of use": (
        {"streaming": "true", "max_length": 12},
        1,
        ".*train.jsonl: --dataset: no row of the stream is of use: .* --max_length 12; .*",
    ),
    "lazy rows with nothing of use": (
        {"lazy_tokenize": "true", "max_length": 12},
        1,
        ".*train.jsonl: --dataset: none of the rows that were tried is of use .* --max_length 12; .*",
    ),
    "a warm-up longer than the epoch": (
        {"train_iters": None, "num_train_epochs": 1, "lr_warmup_iters": 9},
        1,
        "--lr_warmup_iters: is 9, and the learning rate ends after 4 steps; .*",
    ),
    "a tracker that is not installed": ({"report_to": "swanlab"}, 1, "--report_to: is swanlab, which is not .*"),
    "a reference that is not there": (
        {"ref_adapters": "owner/name"},
        1,
        "owner/name: --ref_adapters: no such folder; .*",
    ),
    "modules in one pair of quotes": (
        {"target_modules": "all-linear all-router"},
        1,
        "--target_modules: has 'all-linear all-router' as one name; .*",
    ),
    "modules of another library": (
        {"target_modules": "q_proj"},
        1,
        "--target_modules: has 'q_proj', which no module of the model is called. Megatron's names are linear_fc1, .*",
    ),
    "a pattern that matches nothing": (
        {"target_regex": ".*q_proj"},
        1,
        "--target_regex: '.*q_proj' matches no module of the model; .*linear_qkv.*",
    ),
    "a pattern for one layer": (
        {"target_regex": r".*layers\.0\..*linear_qkv"},
        1,
        r"--target_regex: matches decoder.layers.\*.self_attention.linear_qkv in some layers only, .*",
    ),
    "a module without LoRA": (
        {"target_modules": "output_layer"},
        1,
        r"--target_modules: has no LoRA for output_layer \(ColumnParallelLinear\); .*",
    ),
    "a module that cannot be copied": (
        {"modules_to_save": "all-embedding"},
        1,
        "--modules_to_save: has embedding, of which no copy can be made: .*",
    ),
    "a saved module that is not there": ({"modules_to_save": "lm_head"}, 1, "--modules_to_save: has 'lm_head', .*"),
    "freezing what is not there": (
        {"tuner_type": "full", "freeze_parameters": "model.layers"},
        1,
        "--freeze_parameters: has 'model.layers', with which no parameter's name begins; names are like .*",
    ),
    "everything frozen": (
        {"tuner_type": "full", "freeze_parameters_regex": ".*"},
        1,
        "--freeze_parameters: nothing is left to train: every parameter is frozen; .*",
    ),
    "SGD": ({"optimizer": "sgd"}, 1, "--optimizer: is sgd: Megatron's distributed optimizer .* use --optimizer adam"),
    "gradients in bf16": (
        {"main_grads_dtype": "bf16"},
        1,
        "--main_grads_dtype: is bf16, and Megatron has that with the precision-aware optimizer only; .*",
    ),
    "moments in fp16": ({"exp_avg_sq_dtype": "fp16"}, 1, "--exp_avg_sq_dtype: is fp16, and Megatron .*"),
    "no rows asked": ({"dataset": "pairs.jsonl#0"}, 1, "--dataset: takes 0 rows of pairs.jsonl; .*"),
    "a jinja template": ({"template_backend": "jinja"}, 1, "--template_backend: .* is 'jinja': .*"),
    "no such checkpoint": (
        {"mcore_adapter": "/no/such/checkpoint-1", "finetune": "false"},
        1,
        "--mcore_adapter: there is no checkpoint /no/such/checkpoint-1; no whole checkpoint is beside it",
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, workshop, tmp_path):
    given, ranks, message = FLAGS[case]
    claim = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    assert_told(zygotes().run(tmp_path / "out", flags(workshop, **given), env=claim), message)


def test_experts_of_a_dense_model(workshop, tmp_path):
    given = flags(workshop, model=workshop.dense, model_type="qwen3", expert_model_parallel_size=2)
    run = zygotes().run(tmp_path / "out", given, env={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert_told(run, "--expert_model_parallel_size: the model has no experts, so EP 2 has nothing to split; use EP 1")


def test_an_output_folder_that_cannot_be_written(workshop, tmp_path):
    (tmp_path / "file").write_text("")
    run = zygotes().run(tmp_path / "out", flags(workshop, output_dir=tmp_path / "file" / "out"))
    assert_told(run, f"--output_dir: the output folder {tmp_path}/file/out cannot be written: Not a directory; .*")


@pytest.fixture(scope="module")
def saved(workshop, tmp_path_factory) -> Path:
    """A checkpoint after one step of a LoRA run on the MoE."""
    out = tmp_path_factory.mktemp("saved") / "out"
    zygotes().run(out, flags(workshop, save_safetensors="false")).require_success()
    return out / "checkpoint-1"


CHECKPOINTS = {
    "of another model": (
        {"model": "dense", "model_type": "qwen3"},
        "the checkpoint is of another model: model_type qwen3_moe there and qwen3 here, .*",
    ),
    "of another rank": (
        {"lora_rank": 4},
        "--lora_rank: the checkpoint was trained in another way: lora_rank 8 there and 4 here; .*",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint(case, saved, workshop, tmp_path):
    given, message = CHECKPOINTS[case]
    if given.get("model") == "dense":
        given = given | {"model": workshop.dense}
    run = zygotes().run(tmp_path / "out", flags(workshop, mcore_adapter=saved, finetune="false", **given))
    assert_told(run, f"{saved}/bvpo_state.json: .*{message}")


def test_a_reference_of_another_scale(workshop, tmp_path):
    """ms-swift would run it with the run's own lora_alpha, without a word."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "use_rslora": false}')
    run = zygotes().run(tmp_path / "out", flags(workshop, ref_adapters=tmp_path))
    assert_told(
        run,
        f"{tmp_path}/adapter_config.json: --ref_adapters: lora_alpha is 16 and this run's is 32.0, which it would get; "
        "give --lora_alpha 16, or merge .*",
    )


def test_full_tuning_does_not_go_on_from_an_adapter(saved, workshop, tmp_path):
    given = flags(workshop, mcore_model=saved, finetune="false", tuner_type="full")
    told = "--tuner_type: the checkpoint was trained in another way: tuner_type lora there and full here; .*"
    assert_told(zygotes().run(tmp_path / "out", given), f"{saved}/bvpo_state.json: {told}")
