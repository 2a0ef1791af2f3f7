"""A sweep of real runs, killed at random moments, ends as one that was left alone; a run that fails spoils no other.

In CI two runs and two kills: of the controller alone, and of everything while a run trains on from a checkpoint. With
--whole-matrix six runs and five.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_bvpo.cluster.supervise import descendants
from megatron_bvpo.workflow.leftovers import processes_of
from megatron_bvpo.workflow.records import Record, State
from tests.cluster.small_run import losses, make_small_run
from tests.distributed.cells import ROOT
from tests.unit.chains import kill_all, wait_for

pytestmark = pytest.mark.slow
STEPS = 3


class Sweeps:
    """Sweeps over the same runs, rows and reference cache; each has a folder of its own."""

    def __init__(self, home: Path, runs: int):
        self.home = home
        make_small_run(home / "small", train_iters=STEPS, save_steps=1, global_batch_size=4, dataset_num_proc=1)
        rates = [1e-3, 1e-4, 3e-4, 3e-3, 1e-2, 3e-2][:runs]
        self.runs = [{"name": f"lr-{lr:g}", "rows": "DS1", "lr": lr} for lr in rates]
        if runs > 2:  # and other things that are swept
            self.runs[2] |= {"beta": 0.3}
            self.runs[3] |= {"lora_rank": 8, "lora_alpha": 16}
            self.runs[4] |= {"bvpo_alpha": 0.7}
        self.names = [run["name"] for run in self.runs]

    def start(self, name: str, *more: dict) -> subprocess.Popen:
        file = self.home / f"{name}.yaml"
        train = {"run": str(self.home / "small" / "small.yaml"), "ranks": 1}
        asked = {"train": train, "rows": {"DS1": [str(self.home / "small" / "train.jsonl")]}}
        asked |= {"runs": [*self.runs, *more], "reference_cache": str(self.home / "references")}
        file.write_text(yaml.safe_dump(asked))
        command = [sys.executable, "-m", "megatron_bvpo", "sweep", str(file), "--out", str(self.home / name)]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("BVPO_", "SLURM_"))}
        env |= {"PYTHONPATH": str(ROOT), "BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen([*command, "--cores", "2"], cwd=self.home, env=env, stdout=log, stderr=log)

    def said(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def run(self, name: str, run: str) -> Path:
        return self.home / name / "runs" / run

    def at_work(self, process: subprocess.Popen) -> list[str]:
        """Runs of the sweep that is killed which are running."""
        assert process.poll() is None, self.said("killed")
        return [run for run in self.names if Record(self.home / "killed", f"train/{run}").state() == State.RUNNING]

    def has_saved(self, process: subprocess.Popen) -> bool:
        """Whether one of these has a checkpoint, so that what is killed is a training and no start."""
        return any((self.run("killed", run) / "last-checkpoint").exists() for run in self.at_work(process))

    def shards(self) -> set[Path]:
        return set((self.home / "references").rglob("*.parquet"))


def kill(sweeps: Sweeps, name: str, process: subprocess.Popen, everything: bool) -> None:
    """The controller alone, or all that it has started, as by a loss of power."""
    assert process.poll() is None, f"it has ended: this kill would show nothing\n{sweeps.said(name)}"
    mine = [process.pid, *descendants(process.pid)]
    if everything:
        out = sweeps.home / name
        for stage in (out / "stages").glob("*/*"):
            holder = Record(out, f"{stage.parent.name}/{stage.name}").holder()  # maybe an earlier controller's
            mine += [*([holder] if holder else []), *processes_of(stage)]
    kill_all(mine if everything else mine[:1])
    process.wait()


def weights(run: Path) -> dict[str, bytes]:
    """Of its last checkpoint, in all forms."""
    folder = run / "last-checkpoint"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def sweeps(request, tmp_path_factory) -> Sweeps:
    """One that was killed, with a run that cannot work among its runs, and one that was not, on the same cache."""
    whole = request.config.getoption("--whole-matrix")
    made = Sweeps(tmp_path_factory.mktemp("sweeps"), 6 if whole else 2)
    broken = {"name": "broken", "rows": "DS1", "target_modules": "nowhere"}
    seed = random.randrange(1000)
    print(f"moments of seed {seed}")
    moments = random.Random(seed)
    for i in range(5 if whole else 2):
        process, everything = made.start("killed", broken), i % 2 == 1
        if everything:
            wait_for(functools.partial(made.has_saved, process), "a checkpoint", 600)
        else:
            wait_for(functools.partial(made.at_work, process), "a run", 300)
        time.sleep(moments.uniform(0, 1 if everything else 20 if whole else 5))
        kill(made, "killed", process, everything)
    made.code = made.start("killed", broken).wait(timeout=1500)
    made.filled = made.shards()
    code = made.start("alone").wait(timeout=1500)
    assert code == 0, made.said("alone")
    return made


def test_killed_at_random_moments_it_ends_as_the_one_that_was_not(sweeps):
    for run in sweeps.names:
        killed, alone = sweeps.run("killed", run), sweeps.run("alone", run)
        assert sorted(losses(alone)) == list(range(1, STEPS + 1))
        assert losses(killed) == losses(alone), run
        assert weights(killed) == weights(alone) != {}, run
    adapters = [sweeps.run("alone", run) / "last-checkpoint/vllm/adapter_model.safetensors" for run in sweeps.names]
    assert len({file.read_bytes() for file in adapters}) == len(adapters), "other settings made the same adapter"


def test_a_run_that_fails_spoils_no_other(sweeps):
    out, said = sweeps.home / "killed", sweeps.said("killed")
    assert sweeps.code == 4, said
    assert said.count("failed: ") == 1
    assert all(Record(out, f"train/{run}").done for run in sweeps.names)
    assert (
        "failed: train/broken: exit code 2: " in said
        and "has 'nowhere', which no module of the model is called" in said
    )
    assert f"Page: {out / 'sweep.html'}" in said and (out / "sweep.html").stat().st_size > 1000


def test_a_second_sweep_on_the_same_rows_makes_no_reference_forward(sweeps):
    assert sweeps.filled and sweeps.shards() == sweeps.filled, "reference log-probs were written again"
    for name in ("killed", "alone"):
        for run in sweeps.names:
            lines = (sweeps.run(name, run) / "logging.jsonl").read_text().splitlines()
            hits = [line["ref_cache/hits"] for line in map(json.loads, lines) if "iteration" in line]
            assert hits and set(hits) == {1.0}, (name, run, hits)
