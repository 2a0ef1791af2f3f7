"""Two hosts with disks of their own and one shared folder: rows are read and encoded once, for later starts, too.

Each host is a process whose home and caches are its own, as in an image; torch's and Python's hash seeds differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.cells import ROOT


class Hosts:
    def __init__(self, workshop, folder):
        self.workshop, self.folder, self.shared = workshop, folder, folder / "shared"

    def start(self, name: str, rank: int, world: int, **more: str) -> subprocess.Popen:
        own = self.folder / name
        own.mkdir()
        env = {
            **os.environ,
            **{key: str(own) for key in ("HOME", "MODELSCOPE_CACHE", "HF_HOME", "TMPDIR")},
            **{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{"PYTHONHASHSEED": str(len(name) + rank), "MEETING": str(self.folder / "meeting"), **more},
        }
        command = [sys.executable, "-m", "tests.unit.one_host", str(self.workshop.train), str(self.workshop.moe)]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @staticmethod
    def results(*processes: subprocess.Popen) -> list[dict]:
        said = [process.communicate(timeout=240)[0] for process in processes]
        for process, text in zip(processes, said, strict=True):
            assert process.returncode == 0, text[-3000:]
        return [json.loads(text.rpartition("RESULT ")[2].splitlines()[0]) for text in said]


@pytest.fixture(scope="module")
def hosts(workshop, tmp_path_factory) -> Hosts:
    return Hosts(workshop, tmp_path_factory.mktemp("hosts"))


def test_two_hosts_tokenise_once_and_others_not_again(hosts):
    shared = {"BVPO_DATA_CACHE": str(hosts.shared)}
    a, b = hosts.results(hosts.start("a", 0, 2, **shared), hosts.start("b", 1, 2, **shared))
    rows = len(a["train"]) + len(a["held out"])
    assert rows > 12 and (a["encoded"], a["files"]) == (rows, 1), "the first rank of the job does the work"
    assert (b["encoded"], b["files"]) == (0, 0), "the other host reads what it has done"
    assert (b["train"], b["held out"]) == (a["train"], a["held out"])
    (again,) = hosts.results(hosts.start("another", 0, 1, **shared))
    assert (again["encoded"], again["files"]) == (0, 0), "the job came back on another node"
    assert (again["train"], again["held out"]) == (a["train"], a["held out"])
    left = [path for name in ("a", "b", "another") for path in (hosts.folder / name).rglob("*.arrow")]
    assert not left, "nothing of the rows lies on a node's own disk"
