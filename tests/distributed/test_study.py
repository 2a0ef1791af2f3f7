"""The whole study at sizes that mean nothing (benchmarks/study/run.sh --quick): killed, gone on with, its tables."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.study.plan import ARMS, MORE_ARMS, QUICK, SECOND_ROUND

ROOT = Path(__file__).resolve().parents[2]
# A run is three or four seconds; the whole took under two minutes on two quiet cores.
PATIENCE = 1500


def start(folder: Path) -> subprocess.Popen:
    # The environment is there: BVPO_IN_IMAGE keeps the script from making one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [ROOT / "benchmarks/study/run.sh", "--quick", "--work", folder / "work", "--out", folder / "out"],
        env={**os.environ, "BVPO_IN_IMAGE": "1", "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=(folder / "log.txt").open("a"),
        stderr=subprocess.STDOUT,
    )


def records(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "work" / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder, records that were there when it was killed)"""
    folder = tmp_path_factory.mktemp("study")
    process, end = start(folder), time.monotonic() + PATIENCE
    while len(records(folder)) < 6:
        assert process.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = records(folder)
    time.sleep(3)  # its workers see it within a second
    process = start(folder)
    assert process.wait(PATIENCE) == 0, (folder / "log.txt").read_text()[-3000:]
    return folder, killed


def table(study, name: str) -> list[dict[str, str]]:
    with (study[0] / "out" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_goes_on_where_it_was_killed(study):
    folder, killed = study
    now = records(folder)
    assert len(killed) >= 6
    assert {name: now[name] for name in killed} == killed
    assert not list((folder / "work" / "trained").glob("*"))


def test_all_runs_are_there_with_their_steps_and_answers(study):
    runs = table(study, "runs.csv")
    arms = [line["arm"] for line in runs if int(line["seed"]) <= QUICK.seeds and "tp2pp2" not in line["name"]]
    wanted = dict.fromkeys(("untrained", *MORE_ARMS, *SECOND_ROUND), QUICK.seeds)
    wanted |= dict.fromkeys(ARMS, QUICK.seeds * len(QUICK.batches))
    assert {arm: arms.count(arm) for arm in set(arms)} == wanted
    steps = table(study, "steps.csv")
    answers = {(line["name"], line["mode"]): line["right"] for line in table(study, "answers.csv")}
    for run in runs:
        mine = [line for line in steps if line["name"] == run["name"]]
        assert [int(line["step"]) for line in mine] == list(range(1, int(run["steps"]) + 1))
        for mode in ("thinking", "empty"):
            right = answers[run["name"], mode]
            asked = QUICK.choosing if int(run["seed"]) == 100 else QUICK.questions
            assert len(right) == asked
            assert float(run[f"{mode}_right"]) == pytest.approx(sum(map(int, right)) / asked, abs=1e-6)
    assert len(table(study, "questions.csv")) == QUICK.questions


def test_arms_are_what_they_are_called(study):
    """Of one seed and batch all but the streams is the same; the first step's loss is log 2 for every pair."""
    steps = table(study, "steps.csv")
    batch = max(QUICK.batches)
    first = {
        arm: next(
            line for line in steps if line["name"].startswith(f"{arm}-batch{batch}-") and line["name"][-5:] == "seed1"
        )
        for arm in ARMS
    }
    assert {arm: float(line["alpha"]) for arm, line in first.items()} == {
        "trace": 1,
        "empty": 0,
        "half": 0.5,
        "auto": 0.5,
    }
    for line in first.values():
        assert float(line["loss"]) == pytest.approx(0.693147, abs=2e-6)
    # α = .5 mixes the gradients that the one-stream arms have: by the parallelogram's law.
    square = {arm: float(line["square"]) for arm, line in first.items()}
    assert square["half"] == pytest.approx(square["auto"], rel=1e-4)
    apart = 2 * (square["trace"] + square["empty"]) - 4 * square["half"]
    assert apart == pytest.approx(float(first["auto"]["D"]), rel=1e-3)


def test_a_second_round_goes_on_from_the_first(study):
    """Its policy is no longer the reference; the fresh pairs are others, of questions that were asked before."""
    folder, _ = study
    for seed in range(1, QUICK.seeds + 1):
        again = [run for run in table(study, "runs.csv") if run["arm"] in SECOND_ROUND and run["seed"] == str(seed)]
        assert len(again) == 2
        for line in again:
            of_run = [step for step in table(study, "steps.csv") if step["name"] == line["name"]]
            assert abs(float(of_run[0]["loss"]) - 0.693147) > 1e-4
            start = f"--adapters adapters/auto-batch{max(QUICK.batches)}-rate{line['rate']}-seed{seed} "
            assert start in line["flags"]
        (fresh,) = (folder / "work" / "fresh").glob(f"again-fresh-*-seed{seed}/rows.jsonl")
        stale = folder / "work" / f"seed-{seed}" / "rows.jsonl"
        assert fresh.read_text("utf-8") != stale.read_text("utf-8")
        (line,) = (line for line in table(study, "fresh.csv") if line["name"].endswith(f"seed{seed}"))
        assert 0 < int(line["shared"]) <= int(line["questions"]) <= int(line["rows"])


def test_the_references_are_paid_once(study):
    """Arms of one seed share them: behind the first two runs of a seed nothing is computed."""
    steps = table(study, "steps.csv")
    late = [line for line in steps if line["name"].startswith(("auto-every-step", "mse-every-step", "fixed"))]
    assert len(late) == 3 * QUICK.seeds * QUICK.steps
    assert {float(line["hits"]) for line in late} == {1.0}


def test_four_ranks_agree_with_one(study):
    runs = {line["name"] for line in table(study, "runs.csv")}
    (other,) = (name for name in runs if name.endswith("-tp2pp2"))
    steps = table(study, "steps.csv")
    one, four = ([line for line in steps if line["name"] == name] for name in (other.removesuffix("-tp2pp2"), other))
    for a, b in zip(one, four, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4)
        assert float(a["alpha"]) == pytest.approx(float(b["alpha"]), abs=1e-3)


def test_the_report_has_every_part(study):
    report = (study[0] / "out" / "report.md").read_text("utf-8")
    for part in ("What ran", "Accuracy", "Arm against arm", "Does variance fall", "α and its band", "How far it moves"):
        assert f"## {part}" in report
    for part in ("Beside the main arms", "Is b_t = 0 harmless", "A second round", "One rank and TP2 · PP2"):
        assert f"## {part}" in report
    assert "nan" not in report
    for name in ("accuracy.png", "alpha.png"):
        assert (study[0] / "out" / name).stat().st_size > 5000
