"""What is made of the reports of all nodes beside each other, and who is named."""

from __future__ import annotations

import json

from megatron_bvpo.cluster import compare, link_worker
from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding, NodeReport
from megatron_bvpo.cluster.node_report import verdict_lines
from tests.unit.node_reports import good, job, links, problems, rank_notes, report


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
