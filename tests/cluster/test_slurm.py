"""launch/slurm.sbatch on a real Slurm of two nodes: to the end, over a time limit, with a node that is not right.

BVPO_TEST_IMAGE=FILE.sif runs one of the jobs in that image, too, by containers/apptainer.sh.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest

from tests.cluster.small_run import losses, make_small_run
from tests.distributed.cells import ROOT

pytestmark = pytest.mark.slow
STEPS = 110  # so that the run is well on its way, and not done, when the signal comes after some fifty seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    # Steps of about a second, so that the run is longer than Slurm's shortest useful time limit.
    return make_small_run(tmp_path_factory.mktemp("small"), train_iters=STEPS, global_batch_size=12, save_total_limit=2)


def submit(slurm, config: Path, home: Path, *options: str, **more: str) -> tuple[int, Path]:
    env = {
        "BVPO_RUN_DIR": str(home / "run"),
        "BVPO_GPUS": "1",
        "BVPO_PYTHON_BIN": sys.executable,
        "BVPO_REHEARSAL": "1",
        "BVPO_MIN_FREE_GIB": "1",
        "BVPO_MARGIN_S": "10",
        **more,
    }
    log = home / "job.log"
    arguments = ["--nodes=2", f"--output={log}", *options, str(ROOT / "launch" / "slurm.sbatch"), str(config)]
    return slurm.submit(*arguments, cwd=ROOT, env=env), log


@pytest.fixture(scope="module")
def whole(slurm, config, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    job, log = submit(slurm, config, home)
    record = slurm.wait(job, 210, log)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "0"), log.read_text()[-4000:]
    return home


def test_it_trains_to_the_end(whole):
    told = (whole / "job.log").read_text()
    print(*[line for line in told.splitlines() if "preflight: passed" in line], sep="\n")
    assert "preflight of 2 node(s) with 1 rank(s) each" in told and "preflight: passed" in told
    assert re.search(r"node 0 \(n0\): ended with 0\b", told) and re.search(r"node 1 \(n1\): ended with 0\b", told)
    assert f"finished: {whole / 'run'}, checkpoint-{STEPS}" in told
    assert sorted(losses(whole / "run")) == list(range(1, STEPS + 1))


def test_the_time_limit_saves_requeues_and_the_losses_are_the_same(slurm, config, whole, tmp_path):
    job, log = submit(slurm, config, tmp_path, "--time=2", "--signal=B:USR1@50")
    record = slurm.wait(job, 235, log)
    told = log.read_text()
    assert record["JobState"] == "COMPLETED", told[-4000:]
    print(*[line for line in told.splitlines() if "slurm.sbatch:" in line], sep="\n")
    assert int(record["Restarts"]) >= 1, "the job was over before its time limit: it shows nothing"
    assert "SIGUSR1 after" in told and "Stopped on request after step" in told
    assert "stopped and saved; the job goes back into the queue" in told and "going on from" in told
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_in_an_image_over_a_time_limit(slurm, config, whole, tmp_path):
    """The job's own scripts run on the host; preflight, supervisor and training run in the image on both nodes."""
    image = os.environ.get("BVPO_TEST_IMAGE")
    if not image:
        pytest.skip("BVPO_TEST_IMAGE is not set")
    job, log = submit(
        slurm,
        config,
        tmp_path,
        "--time=3",
        "--signal=B:USR1@80",
        BVPO_IMAGE=image,
        BVPO_APPTAINER=str(ROOT / "containers" / "apptainer.sh"),
        BVPO_BINDS=f"{config.parent},{tmp_path}",
        BVPO_PYTHON_BIN="/nowhere/python",  # the host's, which the image must not look for
    )
    record = slurm.wait(job, 500, log)
    told = log.read_text()
    assert record["JobState"] == "COMPLETED", told[-4000:]
    print(*[line for line in told.splitlines() if "slurm.sbatch:" in line], sep="\n")
    assert int(record["Restarts"]) >= 1 and "preflight: passed" in told
    commands = [p.read_text() for p in (tmp_path / "run" / "logs").rglob("std*.log")]
    assert any("/opt/bvpo/" in text for text in commands), "the ranks did not run in the image"
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_a_node_that_fails_preflight_is_named(slurm, config, tmp_path):
    """On n1 another version of the package comes first: the usual fault of an environment a node."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "megatron_bvpo", other / "megatron_bvpo", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "megatron_bvpo" / "errors.py").open("a") as file:
        file.write("\n# another version\n")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'[ "$SLURMD_NODENAME" != n1 ] || export PYTHONPATH="{other}:$PYTHONPATH"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    job, log = submit(slurm, config, tmp_path, BVPO_PYTHON_BIN=str(python))
    record = slurm.wait(job, 120, log)
    told = log.read_text()
    assert record["JobState"] == "FAILED" and record["ExitCode"] == "3:0", told[-4000:]
    assert re.search(r"PROBLEM +versions: megatron-bvpo: .* on node 0 \(n0\) and .* on node 1 \(n1\)", told)
    assert "nothing was trained" in told and not (tmp_path / "run" / "logging.jsonl").exists()
