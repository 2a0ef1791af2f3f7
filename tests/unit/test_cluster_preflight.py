"""The preflight's judgements, without GPUs: what nodes said, what is made of it, who is named."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

import pytest

from megatron_bvpo.cluster import compare, gpus, link_worker, local_checks, nodes
from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding, NodeReport
from megatron_bvpo.cluster.meeting import Meeting, MeetingLost, MeetingRefused, Visitor
from megatron_bvpo.cluster.node_preflight import ROUNDS, Desk, _within, shared_folders
from megatron_bvpo.cluster.node_report import verdict_lines
from megatron_bvpo.cluster.nodes import Job, job_from_environment
from megatron_bvpo.cluster.plan_check import check_plan, judge_plan
from megatron_bvpo.cluster.shared_folders import SharedFolders
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.run_file import read_run
from tests.unit.cluster_ports import free_pair


def job(rank: int = 0, count: int = 3, **more) -> Job:
    made = {"address": "127.0.0.1", "port": 29500, "gpus": 2, "name": f"host{rank}", **more}
    return Job(nodes=count, rank=rank, **made)


def report(rank: int, **facts) -> NodeReport:
    return NodeReport(rank, f"host{rank}", facts)


def problems(findings) -> list[str]:
    return [f.text for f in findings if f.level == PROBLEM]


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


# ---- nodes beside each other


def test_another_version_names_its_node():
    reports = {r: report(r, versions={"torch": "2.13.0", "peft": "0.18.1"}) for r in range(4)}
    reports[2].facts["versions"]["torch"] = "2.11.0"
    found = compare.compare_facts(reports)
    assert problems(found) == [
        "versions: torch: 2.13.0 on 3 other nodes and 2.11.0 on node 2 (host2). Use one image, or one environment on a "
        "shared disk, for all nodes"
    ]
    del reports[2].facts["versions"]["torch"]
    assert "missing on node 2 (host2)" in problems(compare.compare_facts(reports))[0]


def test_clocks_apart():
    reports = {0: report(0, clock=(0.0, 0.0)), 1: report(1, clock=(-400.0, 0.01)), 2: report(2, clock=(3.0, 0.1))}
    found = compare.compare_clocks(reports)
    assert [(f.level, f.found) for f in found] == [
        (PROBLEM, "node 1 (host1) is 400.0 s behind node 0"),
        (WARNING, "node 2 (host2) is 3.0 s ahead of node 0"),
    ]
    slow_way = {0: report(0, clock=(0.0, 0.0)), 1: report(1, clock=(4.0, 5.0))}
    assert compare.compare_clocks(slow_way)[0].level == OK, "a slow network is no wrong clock"


def rank_notes(*phases, **more) -> list[dict]:
    return [{"phase": phase, **more.get(phase, {})} for phase in phases]


def links(node: int, ranks: dict, **more) -> dict:
    return {"ranks": ranks, "networks": [], "transports": [], "stderr": {}, **more}


DONE = ("started", "computed", "joined", "within", "across", "done")


def good(pairs=(), tflops: float = 600.0, within: float = 300.0) -> list[dict]:
    notes = rank_notes(*DONE, computed={"TFLOPs": tflops}, within={"GBs": within}, across={"GBs": 40.0})
    return notes + [{"phase": "pair", "nodes": list(pair), "GBs": 20.0} for pair in pairs]


def test_all_links_work():
    reports = {r: report(r, infiniband={"mlx5_0/1": "ACTIVE"}) for r in range(2)}
    told = {r: links(r, {"0": good([(0, 1)]), "1": good()}, transports=["NET/IB"], networks=["IB"]) for r in range(2)}
    found = compare.judge_links(told, reports)
    assert {f.level for f in found} == {OK} and "40.00 GB/s" in " ".join(f.text for f in found)
    assert compare.judge_links(told, reports, lowest_GBs=100)[-2].level == WARNING


def test_infiniband_that_nccl_does_not_use():
    reports = {0: report(0, infiniband={"mlx5_0/1": "ACTIVE"}), 1: report(1, infiniband={"mlx5_0/1": "ACTIVE"})}
    told = {
        0: links(0, {"0": good([(0, 1)])}, networks=["IB"]),
        1: links(1, {"0": good([(0, 1)])}, networks=["Socket"]),
    }
    assert (
        "node 1 (host1) has active ports (mlx5_0/1) and NCCL uses TCP"
        in problems(compare.judge_links(told, reports))[0]
    )


def test_the_node_whose_pairs_all_fail_is_named():
    """Rounds (0,1)(2,3) and (1,2): node 3 exchanges nothing; 2 lost one round because of it, and not the other."""
    stuck = rank_notes("started", "computed", "joined", "within", within={"GBs": 300.0})
    told = {
        0: links(0, {"0": stuck + [{"phase": "pair", "nodes": [0, 1], "GBs": 20.0}]}),
        1: links(
            1,
            {
                "0": stuck
                + [{"phase": "pair", "nodes": [0, 1], "GBs": 20.0}, {"phase": "pair", "nodes": [1, 2], "GBs": 9}]
            },
        ),
        2: links(
            2,
            {
                "0": stuck
                + [
                    {"phase": "pair", "nodes": [1, 2], "GBs": 9.0},
                    {"phase": "error", "error": "RuntimeError: Timed out"},
                ]
            },
        ),
        3: links(3, {"0": stuck + [{"phase": "error", "error": "RuntimeError: No route to host"}]}),
    }
    found = problems(compare.judge_links(told, {r: report(r) for r in told}))
    assert len(found) == 1 and found[0].startswith("network: node 3 (host3) cannot exchange data with its neighbours")
    assert "No route to host" in found[0]


def test_a_node_that_cannot_join_is_named():
    far, near = (
        rank_notes("started", "computed", "error", error={"error": "DistNetworkError: refused"}),
        rank_notes("started", "computed", "joined"),
    )
    told = {0: links(0, {"0": near}), 1: links(1, {"0": far})}
    assert problems(compare.judge_links(told, {r: report(r) for r in told})) == [
        "network: node 1 (host1) cannot join the others at MASTER_ADDR:MASTER_PORT (DistNetworkError: refused). Check "
        "the route and firewall from there to node 0, and that nothing else uses MASTER_PORT"
    ]


def test_a_gpu_that_fails_or_is_slow_is_named():
    broken = rank_notes("started", "error", error={"error": "AcceleratorError: CUDA error: uncorrectable ECC error"})
    waiting = rank_notes("started", "computed")
    told = {0: links(0, {"0": waiting, "1": waiting}), 1: links(1, {"0": waiting, "1": broken})}
    found = problems(compare.judge_links(told, {r: report(r) for r in told}))
    assert len(found) == 1 and "rank 1 of node 1 (host1): AcceleratorError" in found[0], "the waiting ones are victims"
    told = {0: links(0, {"0": good([(0, 1)])}), 1: links(1, {"0": good([(0, 1)]), "1": good(tflops=200.0)})}
    slow = [f.text for f in compare.judge_links(told, {r: report(r) for r in told}) if f.level == WARNING]
    assert "GPU 1 of node 1 (host1) computes 200 TFLOP/s" in slow[0]


def test_pairs_form_no_ring():
    rounds = {node: link_worker.pairs_of(node, 5) for node in range(5)}
    assert rounds == {0: [[0, 1]], 1: [[0, 1], [1, 2]], 2: [[2, 3], [1, 2]], 3: [[2, 3], [3, 4]], 4: [[3, 4]]}


# ---- the rounds


def test_a_round_ends_when_all_have_told_or_its_time_is_over():
    clock = [0.0]
    desk = Desk(job(), 100, now=lambda: clock[0])
    assert desk.answer("arrive", 0, "a") == {"open": True, "told": {}}
    assert desk.answer("arrive", 2, "c")["open"]
    clock[0] = 100 * ROUNDS["arrive"] + 1
    assert desk.answer("arrive", 0, "a") == {"open": False, "told": {0: "a", 2: "c"}}
    assert desk.answer("arrive", 1, "too late")["told"] == {0: "a", 2: "c"}, "all nodes must see the same"
    desk.answer("report", 0, "r")
    assert not desk.answer("report", 2, "r")["open"], "those that came are all there is to wait for"


def test_the_missing_are_named_as_the_scheduler_calls_them():
    names = {rank: job(names=("a", "b", "c")).called(rank) for rank in range(3)}
    found = compare.missing_nodes(names, {0, 2}, 3, 38, "10.0.0.1:29501")
    assert len(found) == 1 and found[0].found == "node 1 (b) has not come to 10.0.0.1:29501 within 38 s"


def test_the_verdict_says_once_what_all_nodes_say():
    bad = Finding("disk", PROBLEM, "2 GiB free", "Name another")
    reports = {r: NodeReport(r, f"h{r}", {}, [Finding("GPUs", OK, "8 × H100")]) for r in range(3)}
    reports[1].findings.append(bad)
    lines, found = verdict_lines(reports, [])
    assert lines == ["  ok       all nodes: GPUs: 8 × H100", "  PROBLEM  node 1 (h1): disk: 2 GiB free. Name another"]
    assert found == ["node 1 (h1): disk: 2 GiB free. Name another"]
    assert NodeReport.from_json(json.loads(json.dumps(reports[1].as_json()))) == reports[1]


# ---- the meeting


def test_nodes_meet_over_http_and_strangers_are_refused(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    port = free_pair()
    host = job(port=port, run="mine")
    heard = []
    meeting = Meeting(
        host, "preflight", lambda topic, rank, body: heard.append((topic, rank, body)) or {"n": len(heard)}
    )
    try:
        guest = Visitor(job(1, port=port, run="mine"), "preflight")
        assert guest.ask("arrive", {"ä": 1}) == {"n": 1} and heard == [("arrive", 1, {"ä": 1})]
        with pytest.raises(MeetingRefused, match="another job"):
            Visitor(job(1, port=port, run="other"), "preflight").ask("arrive")
        with pytest.raises(MeetingRefused, match="NNODES is 3 on node 0 and 4"):
            Visitor(job(1, 4, port=port, run="mine"), "preflight").ask("arrive")
        with pytest.raises(MeetingRefused, match="at its preflight"):
            Visitor(job(1, port=port, run="mine"), "run").ask("arrive")
        with pytest.raises(UserError, match=f"port {port + 1} .* cannot be opened"):
            Meeting(host, "run", lambda *_: None)
    finally:
        meeting.close()
    with pytest.raises(MeetingLost):
        guest.ask("arrive", timeout=0.5)


def test_a_guest_waits_for_a_host_that_comes_late():
    port = free_pair()
    guest, started = Visitor(job(1, port=port), "run"), []

    def later():
        time.sleep(0.7)
        started.append(Meeting(job(port=port), "run", lambda *_: "here"))

    thread = threading.Thread(target=later)
    thread.start()
    assert guest.ask_until("beat", None, time.monotonic() + 60) == "here"
    thread.join()
    started[0].close()


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
