"""What is settled before a run is supervised: its file, secrets in it, its folder and restart, its environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_bvpo.cluster.launch_environment import launch_environment, log_folder, swift_command
from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.run_folder import reached, refuse_unresumable, resume_flags, run_folder
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.run_file import read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets


def job(rank: int = 0, nodes: int = 1) -> Job:
    return Job(nodes=nodes, rank=rank, address="127.0.0.1", port=29500, gpus=2, name=f"host{rank}")


# ---- the run's file


def test_yaml_and_flags_as_ms_swift_reads_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset:\n- a.jsonl\n- b.jsonl\nENV:\n  X: 1\nlr: 2.0e-5\n")
    run = read_run([str(file), "--lr", "1e-6"])
    assert run.value("lr") == "1e-6" and run.values("dataset") == ["a.jsonl", "b.jsonl"] and run.env == {"X": "1"}
    assert run.title == "run" and run.argv == (str(file), "--lr", "1e-6")


def test_a_yaml_file_that_is_not_one(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nhub_token: @secret\n")
    with pytest.raises(UserError) as caught:
        read_run([str(file)])
    assert caught.value.line == 2 and caught.value.file == str(file) and "secret" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_run([str(tmp_path / "gone.yaml")])
    with pytest.raises(UserError, match="neither a .yaml file nor a flag"):
        read_run(["run.toml"])


@pytest.mark.parametrize(
    "given",
    [
        ["--hub_token", "hf_x"],
        ["--hub-token=hf_x"],
        ["--swanlab_token", "hf_x"],
        ["--hub_tok", "hf_x"],  # argparse takes abbreviations
        ["----hub_token ", "hf_x"],  # what a YAML key with dashes or a space becomes
        ["--hub_token", "hf_x", "--hub_token", ""],  # the first one is printed, too
        ["--hub_token", "--hf_x"],
        ["--model_kwargs", '{"api_key": "hf_x"}'],
        ["--env", '{"HF_TOKEN": "hf_x"}'],
        ["--dataset", "https://me:hf_x@example.org/rows.jsonl"],
    ],
)
def test_a_secret_in_a_flag_is_refused_without_its_value(given):
    with pytest.raises(UserError) as caught:
        refuse_secrets(read_run(given), {})
    assert "hf_x" not in str(caught.value) and "environment" in str(caught.value)


def test_a_secret_in_yaml_is_refused_and_other_names_are_not(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("hub_token: hf_x\n")
    with pytest.raises(UserError, match="hub_token") as caught:
        refuse_secrets(read_run([str(file)]), {})
    assert "hf_x" not in str(caught.value)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        file.write_text(f"ENV:\n  {name}: s3cret\n")
        with pytest.raises(UserError, match=f"ENV.{name}") as caught:
            refuse_secrets(read_run([str(file)]), {name: "s3cret"})
        assert "s3cret" not in str(caught.value)
    file.write_text("ENV:\n  GOOGLE_APPLICATION_CREDENTIALS: /a.json\n  TOKENIZERS_PARALLELISM: false\n  1: 2\n")
    refuse_secrets(read_run([str(file)]), {"TOKENIZERS_PARALLELISM": "false"})
    with pytest.raises(UserError, match="CREDENTIALS") as caught:  # ms-swift warns with both values
        refuse_secrets(read_run([str(file)]), {"GOOGLE_APPLICATION_CREDENTIALS": "/0ther"})
    assert "a.json" not in str(caught.value) and "0ther" not in str(caught.value)
    harmless = ["--max_new_tokens", "3", "--calculate_per_token_loss", "false", "--new_special_tokens", "a"]
    harmless += ["--model_kwargs", '{"eos_token": "<|im_end|>", "max_tokens": 3}', "--hub_token", "None"]
    harmless += ["--dataset", "https://example.org:443/rows.jsonl"]
    refuse_secrets(read_run(harmless), {})


def test_no_flag_of_ours_or_ms_swifts_is_taken_for_a_secret_but_one():
    found = []
    for name in flag_names():
        try:
            refuse_secrets(read_run([f"--{name}", "x"]), {})
        except UserError:
            found.append(name)
    assert found == ["hub_token"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "hub_token: @hf_x"),
        ("run.yaml", "hub_token: !hf_x"),
        ("run.yaml", "hub_token: !hf_x!a"),
        ("run.yaml", "hub_token: *hf_x"),
        ("run.yaml", 'hub_token: "\\hf_x"'),
        ("run.json", '{"hub_token": "hf_x" "a": 1}'),
    ],
)
def test_what_is_said_of_a_broken_file_quotes_nothing_of_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is no valid") as caught:
        read_run([str(tmp_path / name)])
    assert "hf_x" not in str(caught.value) and caught.value.line == 1


def test_json_may_be_indented_with_tabs(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"hub_token": "hf_x"}, indent="\t"))
    with pytest.raises(UserError, match="hub_token"):
        refuse_secrets(read_run([str(tmp_path / "run.json")]), {})


# ---- the run's folder


def checkpoint(folder: Path, step: int, tuner: str = "lora") -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "bvpo_state.json").write_text(json.dumps({"iteration": step, "tuner": {"tuner_type": tuner}}))
    link = folder / "last-checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(made.name)
    return made


def test_how_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("BVPO_RUN_DIR", raising=False)
    run = read_run(["--output_dir", str(tmp_path / "r")])
    folder = run_folder(run)
    assert folder == tmp_path / "r" and resume_flags(run, folder) == [] and reached(folder) == 0
    made = checkpoint(folder, 4)
    assert resume_flags(run, folder) == ["--finetune", "false", "--mcore_adapter", str(made)] and reached(folder) == 4
    made = checkpoint(folder, 8, "full")
    assert resume_flags(run, folder) == ["--finetune", "false", "--mcore_model", str(made)]
    (made / "bvpo_state.json").unlink()
    with pytest.raises(UserError, match="point .* at a whole checkpoint"):
        resume_flags(run, folder)
    monkeypatch.setenv("BVPO_RUN_DIR", str(tmp_path / "other"))
    assert run_folder(run) == tmp_path / "other"


def test_a_run_that_saves_no_optimizer_is_not_begun_where_it_would_be_restarted(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nno_save_optim: true\n")
    run = read_run([str(file)])
    for env in ({}, {"BVPO_RESUME": "auto"}, {"BVPO_RESUME": "never", "BVPO_ATTEMPT": "slurm-7-0"}):
        with pytest.raises(UserError, match="no_save_optim: is true, and .* cannot go on"):
            refuse_unresumable(run, env)
    refuse_unresumable(run, {"BVPO_RESUME": "never"})
    refuse_unresumable(read_run([str(file), "--no_save_optim", "false"]), {})
    refuse_unresumable(read_run(["--model", "m"]), {})


def test_a_checkpoint_without_an_optimizer_is_not_gone_on_from(tmp_path):
    """One of an older start, in a folder that is trained in again."""
    made = checkpoint(tmp_path / "r", 4)
    (made / "args.json").write_text(json.dumps({"no_save_optim": True}))
    with pytest.raises(UserError, match=f"{made}: was saved with no_save_optim.*BVPO_RESUME=never"):
        resume_flags(read_run(["--model", "m"]), tmp_path / "r")


def test_a_warm_start_goes_on_from_its_own_checkpoint(tmp_path):
    warm = tmp_path / "warm.yaml"
    warm.write_text("model: m\ntuner_type: lora\nmcore_adapter: /sft/adapter\n")
    run, folder = read_run([str(warm)]), tmp_path / "r"
    assert resume_flags(run, folder) == [], "there is none yet: it begins at the SFT adapter"
    made = checkpoint(folder, 4)
    flags = resume_flags(run, folder)
    assert flags == ["--finetune", "false", "--mcore_adapter", str(made)]
    command = swift_command(run, folder, flags)
    assert command.index(str(warm)) < command.index("--mcore_adapter"), "ms-swift puts the file's flags in its place"
    made = checkpoint(folder, 8, "full")
    full = read_run(["--tuner_type", "full", "--mcore_model", "/sft/model"])
    assert resume_flags(full, folder) == ["--finetune", "false", "--mcore_model", str(made)]


def test_what_the_run_is_given(tmp_path):
    run, folder = read_run(["--model", "m"]), tmp_path / "run"
    logs = log_folder(folder, job(1, 2), {"BVPO_ATTEMPT": "slurm-7-0"})
    assert logs == folder / "logs" / "slurm-7-0" / "001-host1"
    env = launch_environment(job(1, 2), run, folder, logs, {"OMP_NUM_THREADS": "4", "HOME": "/h"})
    assert env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and int(env["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0
    assert env["TORCH_FR_BUFFER_SIZE"] == env["TORCH_NCCL_TRACE_BUFFER_SIZE"]
    assert env["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{logs.parent}/flight-recorder/rank-", "one folder for all nodes"
    assert env["TORCH_FR_DUMP_TEMP_FILE"] == env["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] and env["PET_LOG_DIR"] == str(logs)
    assert (env["PET_REDIRECTS"], env["PET_TEE"]) == ("3", "1:3"), (
        "the last node shows its last rank: it has the losses"
    )
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):  # the site's own, under either name
        chosen = launch_environment(job(1, 2), run, folder, logs, {name: "backend:native"})
        assert {k: v for k, v in chosen.items() if k.endswith("_ALLOC_CONF")} == {name: "backend:native"}
    assert env["OMP_NUM_THREADS"] == "4" and env["BVPO_STOP_FILE"] == str(folder / "stop")
    assert launch_environment(job(0, 3), run, folder, logs, {})["PET_TEE"] == "0:3"
    assert launch_environment(job(0, 1), run, folder, logs, {})["PET_TEE"] == "0:3,1:3"
    command = swift_command(run, folder, ["--finetune", "false"])
    assert command[3:6] == ["rlhf", "--model", "m"] and "--load_from_cache_file true" in " ".join(command)
    own = swift_command(read_run(["--load_from_cache_file", "false"]), folder, [])
    assert "--load_from_cache_file" not in own[6:]
    assert env["BVPO_DATA_CACHE"] == f"{folder}/data-cache", "on the disk that all nodes share"
    assert int(env["PET_RDZV_CONF"].removeprefix("timeout=")) > 600, "node 0 may read its files for longer than torch's"
    given = launch_environment(job(1, 2), run, folder, logs, {"BVPO_DATA_CACHE": "rows", "PET_RDZV_CONF": "timeout=9"})
    assert given["BVPO_DATA_CACHE"] == os.path.abspath("rows") and given["PET_RDZV_CONF"] == "timeout=9"


@pytest.mark.parametrize("name, value", [("BVPO_RESUME", "yes"), ("BVPO_NODE_SILENCE_S", "-1")])
def test_settings_that_are_wrong_are_named(tmp_path, name, value):
    with pytest.raises(UserError) as caught:
        launch_environment(job(), read_run(["--model", "m"]), tmp_path, tmp_path, {name: value})
    assert caught.value.field == name and caught.value.remedy
