"""Nodes of a job, what they reported and what their ranks noted."""

from __future__ import annotations

from megatron_bvpo.cluster.findings import PROBLEM, NodeReport
from megatron_bvpo.cluster.nodes import Job


def job(rank: int = 0, count: int = 3, **more) -> Job:
    made = {"address": "127.0.0.1", "port": 29500, "gpus": 2, "name": f"host{rank}", **more}
    return Job(nodes=count, rank=rank, **made)


def report(rank: int, **facts) -> NodeReport:
    return NodeReport(rank, f"host{rank}", facts)


def problems(findings) -> list[str]:
    return [f.text for f in findings if f.level == PROBLEM]


def rank_notes(*phases, **more) -> list[dict]:
    return [{"phase": phase, **more.get(phase, {})} for phase in phases]


def links(node: int, ranks: dict, **more) -> dict:
    return {"ranks": ranks, "networks": [], "transports": [], "stderr": {}, **more}


DONE = ("started", "computed", "joined", "within", "across", "done")


def good(pairs=(), tflops: float = 600.0, within: float = 300.0) -> list[dict]:
    notes = rank_notes(*DONE, computed={"TFLOPs": tflops}, within={"GBs": within}, across={"GBs": 40.0})
    return notes + [{"phase": "pair", "nodes": list(pair), "GBs": 20.0} for pair in pairs]
