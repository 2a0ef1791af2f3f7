"""train.sh on two hosts that are two network namespaces with a cable between them.

Each has its own loopback, addresses and host name, so nothing meets over 127.0.0.1, and the cable can be pulled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.small_run import losses, make_small_run
from tests.distributed.cells import ROOT

pytestmark = pytest.mark.slow
STEPS = 14
SILENCE_S = 10
NODE_LOST = 76


@dataclass
class Host:
    """A network namespace with one cable."""

    name: str
    space: str
    cable: str
    address: str

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.space, *arguments], check=True)

    def start(self, rank: int, port: int, run_dir: Path, config: Path, log: Path, *flags: str, **env: str):
        command = [
            *f"ip netns exec {self.space} unshare --uts sh -c".split(),
            f'hostname {self.name} && exec "$@"',
            "sh",
        ]
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("BVPO_")},
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(port),
            "NPROC_PER_NODE": "1",
            "BVPO_RUN_DIR": str(run_dir),
            "BVPO_NODE_SILENCE_S": str(SILENCE_S),
            "BVPO_MIN_FREE_GIB": "1",
            "BVPO_PYTHON_BIN": sys.executable,
            "MODELSCOPE_CACHE": str(run_dir.parent / f"cache-of-{self.name}"),  # a disk of its own, as in an image
            **env,
        }
        with log.open("ab") as file:
            return subprocess.Popen(
                [*command, str(ROOT / "launch" / "train.sh"), str(config), *flags],
                env=environment,
                stdout=file,
                stderr=file,
            )


@pytest.fixture(scope="module")
def hosts():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    mark = os.getpid()
    made = [Host(f"host-{c}", f"bvpo-{c}-{mark}", f"bv{c}{mark}", f"10.77.0.{i + 1}") for i, c in enumerate("ab")]
    try:
        for host in made:
            subprocess.run(["ip", "netns", "add", host.space], check=True)
        ends = [made[0].cable, "netns", made[0].space, "type", "veth", "peer", made[1].cable, "netns", made[1].space]
        subprocess.run(["ip", "link", "add", *ends], check=True)
        for host in made:
            host.ip("addr", "add", f"{host.address}/24", "dev", host.cable)
            host.ip("link", "set", host.cable, "up")
            host.ip("link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.space], check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_small_run(tmp_path_factory.mktemp("small"), train_iters=STEPS, save_steps=4)


def start_both(hosts, run_dir: Path, config: Path, logs: list[Path], *flags: str, port: int = 29600, **env: str):
    return [host.start(rank, port, run_dir, config, logs[rank], *flags, **env) for rank, host in enumerate(hosts)]


def wait_for(processes, logs, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(log.read_text()[-3000:] for log in logs))
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()


@pytest.fixture(scope="module")
def whole(hosts, config, tmp_path_factory) -> Path:
    """A run over both hosts that nobody disturbed."""
    home = tmp_path_factory.mktemp("whole")
    logs = [home / "a.log", home / "b.log"]
    codes = wait_for(start_both(hosts, home / "run", config, logs), logs, 150)
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    return home


def test_it_trains_over_tcp(whole):
    told = (whole / "a.log").read_text()
    print(*[line for line in told.splitlines() if "preflight: passed" in line or "all-reduce" in line], sep="\n")
    assert "preflight: passed" in told and "all-reduce across nodes" in told
    assert "node 0 (host-a): ended with 0" in told and "node 1 (host-b): ended with 0" in told
    assert sorted(losses(whole / "run")) == list(range(1, STEPS + 1))
    kept = {path.parent.name for path in whole.rglob("*.arrow")}
    assert kept == {"data-cache"}, "the rows lie where both hosts see them, and nowhere else"
    ranks = sorted(p.parts[-5] for p in (whole / "run" / "logs").rglob("stderr.log"))
    assert ranks == ["000-host-a", "001-host-b"], "a log for each rank, by the name of its host"


def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_exactly(hosts, config, whole, tmp_path):
    logs, run_dir = [tmp_path / "a.log", tmp_path / "b.log"], tmp_path / "run"
    processes = start_both(hosts, run_dir, config, logs, BVPO_PREFLIGHT="0", port=29610)
    deadline = time.monotonic() + 120
    while not ((run_dir / "logging.jsonl").exists() and len(losses(run_dir)) >= 5):
        assert time.monotonic() < deadline and processes[0].poll() is None, logs[0].read_text()[-3000:]
        time.sleep(0.1)
    hosts[1].ip("link", "set", hosts[1].cable, "down")
    cut = time.monotonic()
    codes = wait_for(processes, logs, 90)
    took = time.monotonic() - cut
    hosts[1].ip("link", "set", hosts[1].cable, "up")
    told = [log.read_text() for log in logs]
    print(f"reported after {took:.0f} s with a silence of {SILENCE_S} s")
    assert codes == [NODE_LOST, NODE_LOST], told[0][-3000:]
    assert "node 1 (host-b): not heard of for" in told[0]
    assert "node 0 (10.77.0.1) does not answer node 1 (host-b)" in told[1]
    summary = json.loads(next(run_dir.glob("logs/*/summary.json")).read_text())
    assert summary["nodes"][1]["state"].startswith("lost") and summary["nodes"][1]["node"] == "node 1 (host-b)"
    seen = max(losses(run_dir))
    assert 5 <= seen < STEPS and took < 60

    codes = wait_for(start_both(hosts, run_dir, config, logs, BVPO_PREFLIGHT="0", port=29620), logs, 150)
    assert codes == [0, 0], logs[0].read_text()[-3000:]
    assert "going on from" in logs[0].read_text()
    assert losses(run_dir) == losses(whole / "run")


def test_a_host_that_never_comes_is_named(hosts, config, tmp_path):
    log = tmp_path / "a.log"
    process = hosts[0].start(
        0, 29630, tmp_path / "run", config, log, BVPO_PREFLIGHT_SECONDS="20", BVPO_NODES="host-a host-b"
    )
    assert wait_for([process], [log], 60) == [3]
    assert "PROBLEM  nodes: node 1 (host-b) has not come to 10.77.0.1:29631" in log.read_text()


def test_secrets_are_not_printed(hosts, config, tmp_path):
    """Not from the environment, by anybody on the way: screen, logs of the ranks, args.json, checkpoints."""
    secret = "hf_" + "S3cretS3cretS3cret"
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    env = {"HF_TOKEN": secret, "WANDB_API_KEY": secret, "SWANLAB_API_KEY": secret}
    flags = ("--train_iters", "3")
    codes = wait_for(start_both(hosts, tmp_path / "run", config, logs, *flags, port=29640, **env), logs, 150)
    assert codes == [0, 0], logs[0].read_text()[-3000:]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"a.log", "args.json", "stderr.log", "summary.json"} <= {file.name for file in files}
    for file in files:
        assert secret.encode() not in file.read_bytes(), file
