"""What the preflight says where a cause is easily overlooked: a silent log, a slow start, an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bvpo.cluster import compare, local_checks
from megatron_bvpo.cluster import links as cluster_links
from megatron_bvpo.cluster.findings import WARNING
from megatron_bvpo.cluster.shared_folders import SharedFolders
from megatron_bvpo.errors import UserError
from megatron_bvpo.launching.run_file import read_run
from tests.unit.node_reports import good, job, links, problems, report


def test_a_network_that_nobody_names_is_no_silence():
    def judged(backend: str) -> list[str]:
        notes = [{"phase": "joined", "backend": backend}, *good([(0, 1)])]
        told = {r: links(r, {"0": notes}) for r in range(2)}
        found = compare.judge_links(told, {r: report(r, infiniband={}) for r in told})
        return [f.text for f in found if f.level == WARNING]

    assert "NCCL's log names no network" in judged("nccl")[0]
    assert judged("gloo") == [], "on CPU ranks nothing is sent by NCCL"


def test_the_site_s_nccl_debug_does_not_silence_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setattr(cluster_links.subprocess, "Popen", lambda command, env, **more: env)
    env = cluster_links._start(job(0, 1), 0, tmp_path, 5, rehearsal=True)
    assert (env["NCCL_DEBUG"], "NET" in env["NCCL_DEBUG_SUBSYS"]) == ("INFO", True)


def test_a_rank_that_was_only_slow_may_have_more_time():
    told = {0: links(0, {"0": []}), 1: links(1, {"0": good()})}
    found = problems(compare.judge_links(told, {r: report(r) for r in told}))
    assert "did not start in time" in found[0] and "BVPO_PREFLIGHT_SECONDS" in found[0]


def test_in_an_image_the_remedy_names_the_binds(tmp_path, monkeypatch):
    run = read_run(["--dataset", str(tmp_path / "gone.jsonl"), "--model", str(tmp_path / "gone")])
    for name in ("BVPO_IN_IMAGE", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    assert "BVPO_BINDS" not in "".join(problems(local_checks.data_facts(run)[1]))
    monkeypatch.setenv("BVPO_IN_IMAGE", "1")
    assert all("BVPO_BINDS" in text for text in problems(local_checks.data_facts(run)[1]))
    shared = SharedFolders([Path("/proc/cannot/be/made")], 0)
    shared.write()
    assert "BVPO_BINDS" in shared.findings[0].text
    with pytest.raises(UserError, match="BVPO_BINDS"):
        read_run([str(tmp_path / "gone.yaml")])
