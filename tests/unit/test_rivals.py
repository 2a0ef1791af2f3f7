"""Keys of which only one counts: the command line wins over the file, and two in one place are told."""

from __future__ import annotations

import json

import pytest

from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.plan_check import plan_command
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.rivals import RIVALS, settle
from megatron_bvpo.launching.route import check_before_unrolling
from megatron_bvpo.launching.run_file import read_run
from megatron_bvpo.planning.reading import read_settings


def write(folder, **keys) -> str:
    file = folder / "run.yaml"
    file.write_text(json.dumps({"rlhf_type": "bvpo", **keys}))  # JSON is YAML
    return str(file)


# What the file says, what stands behind it, and what of the file's is gone.
ACROSS = {
    "steps": ({"num_train_epochs": 1}, ["--train_iters", "10"], {"num_train_epochs"}),
    "steps with a dash": ({"num_train_epochs": 1}, ["--train-iters=10"], {"num_train_epochs"}),
    "epochs": ({"train_iters": 10}, ["--num_train_epochs", "1"], {"train_iters"}),
    "a stream has both": ({"num_train_epochs": 1, "streaming": True}, ["--train_iters", "10"], set()),
    "a null is no value": ({"num_train_epochs": None}, ["--train_iters", "10"], set()),
    "saves by steps": ({"save_strategy": "epoch"}, ["--save_steps", "5"], {"save_strategy"}),
    "saves by epoch": (
        {"save_steps": 5, "eval_steps": 5},
        ["--save_strategy", "epoch"],
        {"save_steps", "eval_steps"},
    ),
    "the same strategy": ({"save_strategy": "steps"}, ["--save_steps", "5"], set()),
    "evaluation": ({"eval_iters": 0}, ["--eval_steps", "5"], {"eval_iters"}),
    "no evaluation": ({"eval_steps": 5}, ["--eval_iters", "0"], set()),
    "warm-up in steps": ({"lr_warmup_fraction": 0.05}, ["--lr_warmup_iters", "2"], {"lr_warmup_fraction"}),
    "warm-up as a share": ({"lr_warmup_iters": 2}, ["--lr_warmup_fraction", "0.05"], {"lr_warmup_iters"}),
    "modules by name": ({"target_regex": ".*qkv"}, ["--target_modules", "linear_qkv"], {"target_regex"}),
    "a split": ({"val_dataset": "held.jsonl"}, ["--split_dataset_ratio", "0.1"], {"val_dataset"}),
    "no split": ({"val_dataset": "held.jsonl"}, ["--split_dataset_ratio", "0"], set()),
    "held-out rows": ({"split_dataset_ratio": 0.02}, ["--val_dataset", "held.jsonl"], {"split_dataset_ratio"}),
    "another adapter": ({"mcore_adapter": "a"}, ["--adapters", "b"], {"mcore_adapter"}),
    "going on from an adapter": ({"adapters": "a"}, ["--finetune", "false", "--mcore_adapter", "b"], set()),
    "a reference": ({"mcore_ref_model": "a"}, ["--ref_model", "b"], {"mcore_ref_model"}),
    "chunks": (
        {"pipeline_model_parallel_layout": "Et|tL"},
        ["--virtual_pipeline_model_parallel_size", "2"],
        {"pipeline_model_parallel_layout"},
    ),
    "bf16": ({"fp16": True}, ["--bf16", "true"], {"fp16"}),
    "not fp16": ({"fp16": False}, ["--bf16", "true"], set()),
    "no recomputation": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ["--recompute_granularity", "none"],
        {"recompute_method", "recompute_num_layers"},
    ),
}


@pytest.mark.parametrize("case", ACROSS)
def test_the_command_line_wins(case, tmp_path):
    keys, behind, gone = ACROSS[case]
    run = read_run([write(tmp_path, **keys), *behind])
    for key in keys:
        stays = key not in gone
        assert (f"--{key}" in run.flags[: -len(behind)]) == stays, key
    assert list(run.flags[-len(behind) :]) == behind and len(run.notes) == len(gone)
    assert run.argv[1:] == tuple(behind), "what a launcher hands on is what was given"
    # The same answer where the run starts, and where it is planned.
    assert check_before_unrolling([write(tmp_path, **keys), *behind]).flags == run.flags
    behind_keys = {behind[i][2:].replace("-", "_"): behind[i + 1] for i in range(0, len(behind) - 1, 2)}
    if "=" not in behind[0]:
        assert settle(keys, behind_keys)[0] == gone


def test_the_note_says_what_replaced_what(tmp_path):
    file = write(tmp_path, num_train_epochs=1)
    assert read_run([file, "--train_iters", "10"]).notes == (f"--train_iters replaces num_train_epochs of {file}.",)


@pytest.mark.parametrize(
    ("keys", "behind", "message"),
    [
        (
            {"num_train_epochs": 1, "train_iters": 10},
            [],
            "run.yaml: train_iters: is 10, and num_train_epochs 1 would win",
        ),
        (
            {},
            ["--num_train_epochs", "1", "--train_iters", "10"],
            "^--train_iters: is 10, and --num_train_epochs 1 would",
        ),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 2}, [], "lr_warmup_iters: is 2, and lr_warmup_fraction 0.1"),
        ({"fp16": True, "bf16": True}, [], "bf16: is True, and fp16 True would win"),
        ({"save_strategy": "epoch"}, ["--eval_steps", "5"], "--eval_steps: is 5, and --save_strategy epoch would win"),
        ({"adapters": "a"}, ["--tuner_type", "full"], "--tuner_type: is full, and --adapters a would win"),
    ],
)
def test_two_in_one_place_are_refused(keys, behind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_run([write(tmp_path, **keys), *behind])


def test_both_in_the_file_and_one_behind_it(tmp_path):
    """The last of two equal flags wins, so that the file's own is out of the game."""
    run = read_run([write(tmp_path, num_train_epochs=1), "--train_iters", "5", "--train_iters", "10"])
    assert "--num_train_epochs" not in run.flags and run.value("train_iters") == "10"


def test_other_methods_are_ms_swifts(tmp_path):
    run = read_run([write(tmp_path, rlhf_type="dpo", num_train_epochs=1), "--train_iters", "10"])
    assert "--num_train_epochs" in run.flags and not run.notes
    file = tmp_path / "dpo.yaml"
    file.write_text("rlhf_type: dpo\nnum_train_epochs: 1\ntrain_iters: 2\n")
    assert check_before_unrolling([str(file)]) is None


def test_the_plan_and_the_preflight_read_the_same_run(tmp_path):
    file = write(tmp_path, max_length=100, fp16=True, target_regex=".*qkv", recompute_granularity="full",
                 recompute_method="uniform", recompute_num_layers=1)  # fmt: skip
    behind = ["--bf16", "true", "--target_modules", "linear_qkv", "--recompute_granularity", "none"]
    job = Job(nodes=1, rank=0, address="127.0.0.1", port=1, gpus=8, name="host0")
    command = plan_command(read_run([file, *behind]), job, None)
    sets = [command[i + 1].partition("=") for i, word in enumerate(command) if word == "--set"]
    planned = read_settings(file, {key: value for key, _, value in sets})
    assert planned.bf16 and not planned.fp16 and planned.target_modules == ("linear_qkv",)
    assert planned.recompute == "none" and planned.recompute_method is None


def test_all_names_are_flags():
    assert {name for pair in RIVALS for name in (pair.winner, pair.loser)} <= set(flag_names())
