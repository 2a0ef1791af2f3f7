"""`bvpo rounds` with a real engine: two rounds of the small reasoner, killed once in each kind of stage.

    BVPO_VLLM_PYTHON=… pytest --vllm tests/engine/test_rounds.py

A kill takes the command and all that it has started, as a power cut does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_bvpo.evaluation import scores_file
from megatron_bvpo.rehearsal import loop_files
from megatron_bvpo.reporting.run_log import read_log
from megatron_bvpo.sampling.samples import read_judgements, read_samples
from megatron_bvpo.workflow.records import Record, State

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, SAMPLES, QUESTIONS, STEPS = 100, 4, 10, 4
ANSWERS = PROMPTS * SAMPLES * 2
MARK = "BVPO_TEST_ROUNDS"
# The training is one that began with an adapter.
KILLED = tuple(f"round-1/{kind}" for kind in ("sample", "judge", "pairs", "export", "evaluate")) + ("round-2/train",)


class Command:
    """`bvpo rounds rounds.yaml`, and all that it starts."""

    def __init__(self, folder: Path):
        self.mark, self.log = uuid.uuid4().hex, folder / "rounds.log"
        quiet = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_bvpo", "rounds", "rounds.yaml"],
                cwd=folder,
                env={**os.environ, **quiet, "BVPO_REHEARSAL": "1", "VLLM_NO_USAGE_STATS": "1", MARK: self.mark},
                stdout=log,
                stderr=log,
            )

    def all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        for process in self.all():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def told(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with rounds.yaml: the shipped file, with small numbers."""
    home = tmp_path_factory.mktemp("rounds")
    loop_files.prepare(home, PROMPTS, QUESTIONS)
    rounds = yaml.safe_load((ROOT / "configs" / "rehearsal_rounds.yaml").read_text())
    rounds |= {"out": "out"}
    rounds["sample"]["samples"] = SAMPLES
    rounds["evaluate"]["repeats"] = 1
    rounds["pairs"]["heldout"] = 0.4  # of a few, both streams
    one = {"ranks": 1, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": None}
    short = {"train_iters": STEPS, "eval_steps": STEPS, "save_steps": 2, "global_batch_size": 8}
    rounds["train"] |= {"run": str(ROOT / "configs" / "rehearsal.yaml"), **one, **short}
    (home / "rounds.yaml").write_text(yaml.safe_dump(rounds))
    return home


def begun(out: Path, stage: str) -> bool:
    """Whether a stage is in the middle of its work."""
    record, folder = Record(out, stage), out / stage.partition("/")[0]
    if record.state() != State.RUNNING:
        return False
    kind = stage.partition("/")[2]
    if kind == "sample":
        return (folder / "samples" / "prompts.parquet").exists() and any(read_samples(folder / "samples"))
    if kind == "train":
        return (folder / "run" / "last-checkpoint").exists()
    if kind == "evaluate":
        return any((folder / "run" / "eval").glob("answers/*/journal/*"))
    # The others last a few seconds.
    return record.log.exists() and time.time() - record.log.stat().st_mtime > 1


@pytest.fixture(scope="module")
def ended(home) -> tuple[Path, list[str]]:
    """(the folder of all rounds, the stages that were killed)."""
    out, killed = home / "out", []
    waiting = list(KILLED)
    command = Command(home)
    try:
        while command.process.poll() is None:
            for stage in [stage for stage in waiting if begun(out, stage)]:
                command.kill()
                waiting.remove(stage)
                killed.append(stage)
                command = Command(home)
            time.sleep(0.05)
    finally:
        command.kill()
    print(command.told())
    assert command.process.returncode == 0, command.told()[-4000:]
    return out, killed


def test_it_was_killed_in_each_kind_of_stage(ended):
    assert sorted(ended[1]) == sorted(KILLED)


@pytest.mark.parametrize("number", [1, 2])
def test_each_round_has_all_of_its_answers_once(ended, number):
    folder = ended[0] / f"round-{number}" / "samples"
    counted = Counter(sample.key for sample in read_samples(folder) if sample.text is not None)
    assert len(counted) == ANSWERS and set(counted.values()) == {1}
    assert {judgement.key for judgement in read_judgements(folder, "gym")} == counted.keys()
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["model"], settings["seed"]) == (("start", 0), ("round-1", 1))[number - 1]


@pytest.mark.parametrize("number", [1, 2])
def test_each_round_trained_all_of_its_steps(ended, number):
    training, _ = read_log(ended[0] / f"round-{number}" / "run")
    assert sorted({line["step"] for line in training}) == list(range(1, STEPS + 1))


def test_the_reference_of_the_second_round_is_the_start(ended):
    """Before its first step the policy is round 1's model, which prefers what it was taught: margins are not 0."""
    for number, at_zero in ((1, True), (2, False)):
        _, evaluation = read_log(ended[0] / f"round-{number}" / "run")
        assert evaluation[0]["step"] == 0 and (evaluation[0]["eval_rewards/margins"] == 0) == at_zero


def test_three_models_were_asked_and_one_page_tells_of_them(ended, home):
    out = ended[0]
    for name in ("start/eval", "round-1/run/eval", "round-2/run/eval"):
        for score in scores_file.read(out / name).scores:
            assert (score.questions, score.answers, score.failed) == (QUESTIONS, QUESTIONS, 0)
    page = (out / "rounds.html").read_text()
    assert all(name in page for name in ("start", "round-1", "round-2"))
    told = (home / "rounds.log").read_text().splitlines()
    assert told[-1] == f"Page: {out / 'rounds.html'}" and sum("problems" in line for line in told[-8:]) == 4


def test_asked_again_nothing_is_done(ended, home):
    again = Command(home)
    assert again.process.wait(300) == 0
    assert "running" not in again.told().split("Page:")[-2]
