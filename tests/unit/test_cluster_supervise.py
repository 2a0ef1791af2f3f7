"""The supervisor with commands that stand for the run: stop requests, lost nodes, summaries, logs, defaults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_bvpo.cluster.launch_environment import launch_environment, log_folder, swift_command
from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.roll_call import ENDED, RUNNING, RollCall
from megatron_bvpo.cluster.run_folder import reached, refuse_unresumable, resume_flags, run_folder
from megatron_bvpo.cluster.run_logs import first_error
from megatron_bvpo.cluster.supervise import NODE_LOST, STOPPED, Supervisor, descendants
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.run_file import read_run
from megatron_bvpo.launching.secret_flags import refuse_secrets
from tests.unit.cluster_ports import free_pair


def job(rank: int = 0, nodes: int = 1, port: int = 29500, gpus: int = 2) -> Job:
    return Job(nodes=nodes, rank=rank, address="127.0.0.1", port=port, gpus=gpus, name=f"host{rank}")


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


# ---- the roll call


def test_a_silent_node_is_named():
    clock = [0.0]
    book = RollCall({0: "node 0 (a)", 1: "node 1 (b)", 2: "node 2"}, 60, now=lambda: clock[0])
    for rank, name in ((0, "a"), (1, "b")):
        assert book.answer("beat", rank, {"name": name, "state": RUNNING})["trouble"] is None
    clock[0] = 59
    assert book.trouble() is None
    clock[0] = 65
    book.answer("beat", 0, {"name": "a", "state": RUNNING})
    assert book.trouble() == "node 1 (b), node 2: not heard of for 65 s"
    book.answer("beat", 2, {"name": "c", "state": RUNNING})
    assert book.trouble() == "node 1 (b): not heard of for 65 s", "late, and not lost"
    assert [row["state"] for row in book.table()] == [RUNNING, "lost, silent for 65 s", RUNNING]


def test_a_node_that_fails_is_told_to_the_others_and_one_that_is_done_is_not_lost():
    clock = [0.0]
    book = RollCall({0: "node 0", 1: "node 1"}, 60, now=lambda: clock[0])
    book.answer("beat", 1, {"name": "b", "state": ENDED, "code": 0})
    clock[0] = 1000
    assert not book.over()
    assert book.answer("beat", 0, {"name": "a", "state": RUNNING})["trouble"] is None
    assert book.answer("beat", 0, {"name": "a", "state": ENDED, "code": 0})["over"]
    book.answer("beat", 1, {"name": "b", "state": ENDED, "code": 1, "message": "OutOfMemoryError: …"})
    assert book.trouble() == "node 1 (b) ended with exit code 1: OutOfMemoryError: …"


def test_the_first_error_of_the_ranks(tmp_path):
    def log(rank: int, text: str, age: float) -> None:
        file = tmp_path / "none_x" / "attempt_0" / str(rank) / "stderr.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, (time.time() - age, time.time() - age))

    assert first_error(tmp_path) == ""
    log(0, "Traceback …\nRuntimeError: [gloo] Connection closed by peer [10.0.0.2]:123\n", 30)
    log(1, "Traceback …\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nmore\n", 10)
    assert first_error(tmp_path).startswith(
        "torch.OutOfMemoryError: CUDA out of memory. ["
    ) and "/1/stderr.log]" in first_error(tmp_path)
    log(2, "megatron-bvpo: error: --lr: …\nRuntimeError: x\n", 1)
    assert first_error(tmp_path).startswith("megatron-bvpo: error: --lr: …")
    assert first_error(tmp_path, [tmp_path / "none_x"]) == "", "an earlier start's errors are no news"


# ---- the supervisor itself, as a process


NODE = """
import os
import sys
from pathlib import Path
from megatron_bvpo.cluster import supervise
from megatron_bvpo.cluster.nodes import Job
supervise.BEAT, supervise.GRACE, supervise.VICTIM_PATIENCE = 0.2, 1.0, 3.0
rank, nodes, port = map(int, sys.argv[1:4])
folder, silence, code = Path(sys.argv[4]), float(sys.argv[5]), sys.argv[6]
job = Job(nodes=nodes, rank=rank, address="127.0.0.1", port=port, gpus=1, name=f"host{rank}")
logs = folder / "logs" / "run" / f"{rank:03d}"
logs.mkdir(parents=True, exist_ok=True)
env = {**os.environ, "BVPO_STOP_FILE": str(folder / "stop")}
sys.exit(supervise.Supervisor(job, [sys.executable, "-c", code], env, logs, silence).run())
"""
# A rank that ignores SIGTERM, as one that is stuck in a collective does.
STUCK = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
OBEYS = (
    "import os, time, pathlib; f = os.environ['BVPO_STOP_FILE']; print('up', flush=True)\n"
    "while not os.path.exists(f): time.sleep(0.05)\n"
    "pathlib.Path(f + '.done').write_text('{}')"
)


def start(folder: Path, code: str, rank: int = 0, nodes: int = 1, port: int = 0, silence: float = 2.0):
    command = [sys.executable, "-c", NODE, *map(str, (rank, nodes, port, folder, silence)), code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)


def until_up(process) -> None:
    assert process.stdout.readline().strip() == "up"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_becomes_the_file_and_a_stop_has_its_own_code(tmp_path, number):
    process = start(tmp_path, OBEYS)
    until_up(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == STOPPED, err
    assert "stopped on request, saved, can go on" in out
    assert (tmp_path / "stop").read_text().strip() == signal.Signals(number).name, "tells it from a user's touch"


def test_the_code_of_a_run_that_fails_is_kept(tmp_path):
    process = start(tmp_path, "raise SystemExit(9)")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 9 and "failed with exit code 9" in err
    assert json.loads((tmp_path / "logs" / "run" / "summary.json").read_text())["code"] == 9


def test_a_node_that_dies_ends_the_others_and_is_named(tmp_path):
    port = free_pair()
    nodes = [start(tmp_path, STUCK, rank, 2, port) for rank in range(2)]
    for node in nodes:
        until_up(node)
    time.sleep(1.0)
    lost = [nodes[1].pid, *descendants(nodes[1].pid)]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    _, err = nodes[0].communicate(timeout=30)
    nodes[1].communicate()
    assert nodes[0].returncode == NODE_LOST and "node 1 (host1): not heard of for" in err
    assert time.monotonic() - begin < 12, "a rank that does not listen must not hold it up"


def test_a_node_whose_node_0_is_gone_says_so(tmp_path):
    port = free_pair()
    nodes = [start(tmp_path, STUCK, rank, 2, port) for rank in range(2)]
    for node in nodes:
        until_up(node)
    time.sleep(1.0)
    for pid in [nodes[0].pid, *descendants(nodes[0].pid)]:
        os.kill(pid, signal.SIGKILL)
    _, err = nodes[1].communicate(timeout=30)
    nodes[0].communicate()
    assert nodes[1].returncode == NODE_LOST and "node 0 (127.0.0.1) does not answer node 1 (host1)" in err


def test_a_node_that_fails_ends_the_others_with_its_name(tmp_path):
    port = free_pair()
    nodes = [start(tmp_path, STUCK, 0, 2, port), start(tmp_path, "raise SystemExit(7)", 1, 2, port)]
    outs = [node.communicate(timeout=30) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 7] or nodes[0].returncode != 0, outs
    assert "node 1 (host1) ended with exit code 7" in outs[0][1]


def test_the_node_that_failed_is_named_and_not_the_one_that_only_lost_it(tmp_path):
    """Node 0 ends first, without a reason of its own; node 1 needs a second to die of what went wrong."""
    port = free_pair()
    log = tmp_path / "logs" / "run" / "001" / "none_a" / "attempt_0" / "0" / "stderr.log"
    dying = (
        f"import time, pathlib; time.sleep(1); log = pathlib.Path({str(log)!r}); log.parent.mkdir(parents=True)\n"
        "log.write_text('torch.OutOfMemoryError: CUDA out of memory\\n'); raise SystemExit(7)"
    )
    nodes = [start(tmp_path, "raise SystemExit(1)", 0, 2, port), start(tmp_path, dying, 1, 2, port)]
    outs = [node.communicate(timeout=30) for node in nodes]
    assert "supervise:   node 1 (host1) ended with exit code 7: torch.OutOfMemoryError" in outs[0][1], outs
    assert "Exception" not in outs[0][1], outs


def test_two_nodes_that_finish_say_so_once(tmp_path):
    port = free_pair()
    nodes = [start(tmp_path, f"import time; time.sleep({rank})", rank, 2, port) for rank in range(2)]
    outs = [node.communicate(timeout=30) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert "node 0 (host0): ended with 0" in outs[0][0] and "node 1 (host1): ended with 0" in outs[0][0]


def test_descendants_are_found_across_sessions():
    child = subprocess.Popen(["sh", "-c", "setsid sleep 30 & wait"])
    try:
        deadline = time.monotonic() + 5
        while not (found := descendants(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found and threading.active_count() >= 1
    finally:
        for pid in [*descendants(child.pid), child.pid]:
            os.kill(pid, signal.SIGKILL)
        child.wait()


def test_supervisor_takes_a_job(tmp_path):
    env = {**os.environ, "BVPO_STOP_FILE": str(tmp_path / "stop")}
    assert Supervisor(job(), ["true"], env, tmp_path, 60).watch.book is None, "one node needs no roll call"
