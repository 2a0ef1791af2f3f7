"""The preflight of one node, without GPUs: where it is, its GPUs, its ports, its files."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from megatron_bvpo.cluster import gpus, local_checks, nodes
from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding
from megatron_bvpo.cluster.node_preflight import _within, shared_folders
from megatron_bvpo.cluster.nodes import job_from_environment
from megatron_bvpo.cluster.plan_check import check_plan, judge_plan
from megatron_bvpo.cluster.shared_folders import SharedFolders
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.run_file import read_run
from tests.unit.node_reports import job, problems

# ---- where am I


def test_the_environment_of_a_node():
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NPROC_PER_NODE": "8", "BVPO_NODES": "a b"}
    found = job_from_environment({**env, "BVPO_NODE_NAME": "b"})
    assert (found.nodes, found.rank, found.gpus, found.world_size, found.meeting_port) == (2, 1, 8, 16, 29501)
    assert found.label == "node 1 (b)" and found.called(0) == "node 0 (a)"


@pytest.mark.parametrize(
    "env, field",
    [
        ({"NNODES": "two"}, "NNODES"),
        ({"NNODES": "2"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"MASTER_PORT": "80"}, "MASTER_PORT"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "x", "BVPO_NODES": "a b c"}, "BVPO_NODES"),
    ],
)
def test_every_variable_that_is_missing_or_wrong_is_named(env, field):
    with pytest.raises(UserError) as caught:
        job_from_environment(env)
    assert caught.value.field == field and caught.value.remedy


def test_the_interface_of_an_address():
    assert nodes.interface_towards("127.0.0.1") == "lo"
    assert nodes.interface_towards("no such host at all") is None


# ---- GPUs


def gpu(index: int = 0, **other) -> dict[str, str]:
    row = dict.fromkeys((*gpus.FIELDS, *gpus.SLOWDOWNS), "[N/A]")
    row |= {"index": str(index), "name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{index}", "memory.total": "81559"}
    row |= {"memory.used": "4", "temperature.gpu": "33", "driver_version": "570.1", "mig.mode.current": "Disabled"}
    return {**row, **other}


def test_healthy_gpus():
    found = gpus.judge([gpu(i) for i in range(8)], [], 8)
    assert [f.level for f in found] == [OK] and "8 × NVIDIA H100" in found[0].found


@pytest.mark.parametrize(
    "row, apps, level, words",
    [
        ({"memory.used": "71000"}, [], PROBLEM, "71000 MiB are in use"),
        ({}, [{"gpu_uuid": "GPU-0", "pid": "4711", "used_memory": "500"}], PROBLEM, "process 4711"),
        ({"ecc.errors.uncorrected.volatile.total": "2"}, [], PROBLEM, "2 uncorrected"),
        ({"mig.mode.current": "Enabled"}, [], PROBLEM, "MIG"),
        ({"temperature.gpu": "91"}, [], WARNING, "91 °C"),
        ({"hw_slowdown": "Active"}, [], WARNING, "slowed down"),
    ],
)
def test_a_gpu_that_is_not_right(row, apps, level, words):
    found = gpus.judge([gpu(**row), gpu(1)], apps, 2)
    assert [(f.level, f.check) for f in found] == [(level, "GPU 0")] and words in found[0].found


def test_a_gpu_that_has_fallen_off_the_bus():
    assert "7 GPUs are visible and 8 ranks" in problems(gpus.judge([gpu(i) for i in range(7)], [], 8))[0]


def test_nvidia_smi_is_run_and_read(tmp_path):
    smi = tmp_path / "nvidia-smi"
    row = ", ".join(gpu()[name] for name in gpus.FIELDS)

    def answers(slowdowns: str) -> None:
        smi.write_text(f'#!/bin/sh\ncase "$*" in *_reasons*) {slowdowns};; *) echo "{row}";; esac\n')

    answers("echo 'Field is not a valid field to query.'; exit 2")
    smi.chmod(0o755)
    assert gpus.query(str(smi)) == [gpu()], "a field that the driver does not know is no fault of the node's"
    answers('case "$*" in *event*) exit 2;; *) echo "0, Active, Not Active";; esac')  # an older driver
    assert gpus.query(str(smi)) == [gpu(hw_slowdown="Active", hw_thermal_slowdown="Not Active")]
    smi.write_text("#!/bin/sh\necho 'Unable to determine the device handle: GPU is lost' >&2; exit 15\n")
    assert gpus.query(str(smi)) == "Unable to determine the device handle: GPU is lost"
    smi.write_text("#!/bin/sh\nsleep 9\n")
    assert gpus.query(str(smi), timeout=0.2) == "it did not answer in 0.2 s"


def test_the_gpus_that_this_job_sees():
    rows = [gpu(i) for i in range(4)]
    assert gpus.visible(rows, None) == rows
    assert [row["index"] for row in gpus.visible(rows, "1,3")] == ["1", "3"]
    assert [row["index"] for row in gpus.visible(rows, "GPU-2")] == ["2"]


# ---- a node by itself


def test_infiniband_ports(tmp_path):
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / device / "ports" / "1").mkdir(parents=True)
        (tmp_path / device / "ports" / "1" / "state").write_text(state + "\n")
    ports = local_checks.infiniband_ports(tmp_path)
    assert ports == {"mlx5_0/1": "ACTIVE", "mlx5_1/1": "DOWN"}
    some = local_checks.check_infiniband(ports, resource.RLIM_INFINITY)
    assert [f.level for f in some] == [WARNING]
    assert problems(local_checks.check_infiniband({"mlx5_1/1": "DOWN"}, resource.RLIM_INFINITY))
    assert "locked memory" in problems(local_checks.check_infiniband({"mlx5_0/1": "ACTIVE"}, 8 * 1024**2))[0]
    assert local_checks.check_infiniband({}, 0) == []


def test_data_that_is_missing_is_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    facts, found = local_checks.data_facts(read_run(["--dataset", f"{rows}#5", str(tmp_path / "gone.jsonl")]))
    assert list(facts) == [str(rows)] and "gone.jsonl: No such file" in problems(found)[0]
    rows.write_text("[]\n")
    assert local_checks.data_facts(read_run(["--dataset", str(rows)]))[0] != facts, "same size, other bytes"


def test_a_shared_folder_that_is_not_shared(tmp_path):
    folders = [tmp_path / "both", tmp_path / "own"]
    first, second = SharedFolders(folders, 0), SharedFolders([folders[0], tmp_path / "elsewhere"], 1)
    # Both call it by one name, and it is two folders: each node's own disk.
    marks = {0: first.write(), 1: {str(folders[0]): second.name, str(folders[1]): second.name}}
    second.write()
    found = first.look_for(marks, {0: "node 0 (a)", 1: "node 1 (b)"}, time.monotonic())
    assert len(problems(found)) == 1 and f"{folders[1]} is not shared: what node 1 (b) wrote" in problems(found)[0]
    first.remove()
    second.remove()
    assert not list(tmp_path.rglob(".bvpo*"))


def test_a_check_that_hangs_or_fails_becomes_a_finding():
    findings: list[Finding] = []
    assert _within(0.1, "GPUs", lambda: time.sleep(3), findings, "nothing") == "nothing"
    assert _within(5, "disk", lambda: 1 / 0, findings, "nothing") == "nothing"
    assert [f.check for f in findings] == ["GPUs", "disk"] and "no answer in 0.1 s" in findings[0].found


@pytest.mark.parametrize(
    "code, out, err, level", [(0, "…\nfits: 70 of 80 GiB", "", OK), (1, "DOES NOT FIT: 90 of 80 GiB", "", PROBLEM)]
)
def test_what_the_plan_says(code, out, err, level):
    assert [f.level for f in judge_plan(code, out, err)] == [level]
    assert judge_plan(2, "", "megatron-bvpo: error: x.yaml: TP 3 …")[0].level == PROBLEM
    assert judge_plan(-9, "", "")[0].level == WARNING


def test_a_model_that_the_plan_does_not_know_stops_no_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": {}}))
    for model in (str(tmp_path), "somebody/A-Model-On-The-Hub"):
        file = tmp_path / "run.yaml"
        file.write_text(f"rlhf_type: bvpo\nmodel: {model}\ntuner_type: lora\nmax_length: 4096\n")
        (finding,) = check_plan(read_run([str(file)]), job(count=1), 80.0, timeout=60)
        assert finding.level == WARNING and "plan" in finding.found, finding


def test_files_of_the_checkout_make_the_version(tmp_path, monkeypatch):
    before = local_checks.source_digest()
    assert before == local_checks.source_digest() and len(before) == 8
    (tmp_path / "megatron_bvpo").mkdir()
    (tmp_path / "megatron_bvpo" / "__init__.py").write_text("")
    monkeypatch.setattr(local_checks.megatron_bvpo, "__file__", str(Path(tmp_path, "megatron_bvpo", "__init__.py")))
    assert local_checks.source_digest() != before


# ---- the rows of the run


def test_the_folder_of_the_rows_is_shared_and_has_room(tmp_path, monkeypatch):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("{}\n" * 1000)
    run = read_run(["--dataset", f"{rows}#10", "some/hub", "--output_dir", str(tmp_path / "run")])
    for name in ("BVPO_RUN_DIR", "BVPO_DATA_CACHE", "BVPO_SHARED_FOLDERS"):
        monkeypatch.delenv(name, raising=False)
    assert shared_folders(run) == [tmp_path / "run", tmp_path / "run" / "data-cache"]
    monkeypatch.setenv("BVPO_DATA_CACHE", str(tmp_path / "rows"))
    monkeypatch.setenv("BVPO_SHARED_FOLDERS", f"{tmp_path / 'rows'}:/more")
    assert shared_folders(run) == [tmp_path / "run", tmp_path / "rows", Path("/more")]

    assert local_checks.check_room_for_rows(tmp_path, run).level == OK
    full = type("Usage", (), {"free": 2 * rows.stat().st_size})
    monkeypatch.setattr(local_checks.shutil, "disk_usage", lambda folder: full)
    found = local_checks.check_room_for_rows(tmp_path, run)
    assert found.level == PROBLEM and "BVPO_DATA_CACHE" in found.remedy, "the rows lie there twice"
