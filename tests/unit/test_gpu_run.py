"""The driver of benchmarks/gpu.sh: whole lines after a kill at any moment, peers that fail, the budget, the tables."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import plan
from benchmarks.gpu.__main__ import forget
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.plan import Job, Phase
from benchmarks.gpu.tables import tables
from tests.unit.fake_figures import HERE, figure, job, run, slow_phases

ROOT = Path(__file__).resolve().parents[2]


def keys(phases: list[Phase]) -> list[str]:
    return [figure.key for phase in phases for figure in phase.figures]


@pytest.mark.parametrize("lines_there", [0, 2, 8])
def test_a_kill_leaves_whole_lines_and_the_next_start_goes_on(tmp_path, lines_there):
    """kill -9 before the first line, in the middle of a job, and in the second job."""
    file = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", HERE, str(tmp_path)]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while (len(file.read_text().splitlines()) if file.exists() else 0) < lines_there:
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(0.5)  # the worker goes with it
    text = file.read_text() if file.exists() else ""
    assert not text or text.endswith("\n")
    before = [json.loads(line)["key"] for line in text.splitlines()]
    assert lines_there <= len(before) < 12 and len(set(before)) == len(before)
    time.sleep(0.4)
    assert (file.read_text() if file.exists() else "") == text, "a worker outlived its driver"

    left, found = run(tmp_path, slow_phases())
    after = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert left == [] and after[: len(before)] == before
    assert sorted(after) == sorted(keys(slow_phases())), "each figure once: what was there is not measured again"


def test_a_torn_last_line_is_left_out_and_its_figure_measured_again(tmp_path):
    file = tmp_path / "gpu.jsonl"
    whole = json.dumps({"key": "0/0", "on": "a card", "ms": 5.0})
    file.write_text(whole + "\n" + json.dumps({"key": "0/1", "on": "a card", "ms": 5.0})[:20])
    _, found = run(tmp_path, slow_phases())
    assert set(found) == set(keys(slow_phases()))
    assert found["0/0"]["ms"] == 5.0 and found["0/1"]["ms"] == 1
    assert file.read_text().splitlines()[1].startswith('{"key": "0/1", "on"')  # nothing was cut away


def test_figures_of_another_card_are_not_taken_for_ours(tmp_path):
    Lines(tmp_path / "gpu.jsonl").append({"key": "one", "on": "another card", "ms": 1.0})
    _, found = run(tmp_path, [Phase("a", 5, [job("a", figure("one", "fine", value=2))])])
    assert found["one"]["ms"] == 2


def test_a_peer_that_raises_crashes_hangs_or_is_missing_is_marked_and_the_rest_goes_on(tmp_path):
    peers = [
        job("raising", figure("raising/1", "raises"), figure("raising/2", "fine", value=1)),
        job("crashing", figure("crashing/1", "crashes"), figure("crashing/2", "fine", value=2)),
        job("hanging", figure("hanging/1", "hangs"), figure("hanging/2", "fine", value=3)),
        job("missing", figure("missing/1", "missing"), figure("missing/2", "fine", value=4)),
        job("hopeless", *(figure(f"hopeless/{i}", "crashes") for i in range(5))),
        Job("absent", [figure("absent", "fine", value=6)], needs="quack"),
        Job("present", [figure("present", "fine", value=7)], start=0.5, needs="json"),
        job("last", figure("last", "fine", value=5)),
    ]
    left, found = run(tmp_path, [Phase("peers", 60, peers)])
    assert left == []
    assert found["raising/1"]["failed"] == "ValueError: no such shape" and found["raising/2"]["ms"] == 1
    assert found["crashing/1"]["failed"] == "process ended with 13: about to go" and found["crashing/2"]["ms"] == 2
    assert found["hanging/1"]["failed"].startswith("stopped after 4 s") and found["hanging/2"]["ms"] == 3
    missing = "Unavailable: the peer (not installed)"
    assert found["missing/1"]["failed"] == found["missing/2"]["failed"] == missing
    said = [found[f"hopeless/{i}"]["failed"] for i in range(5)]
    assert [text.startswith("process ended with 13") for text in said] == [True, True, False, False, False]
    assert said[4] == "not tried: 2 figures of this process had failed"
    assert found["last"]["ms"] == 5 and found["present"]["ms"] == 7
    assert found["absent"]["failed"].startswith("quack is not installed: its nvidia-cutlass-dsl")


def test_the_budget_is_kept_and_later_phases_have_their_seconds(tmp_path):
    greedy = [figure(f"greedy/{i}", "fine", 0.5, value=i, seconds=0.5) for i in range(40)]
    phases = [
        Phase("greedy", 100, [job("greedy", *greedy)]),
        Phase("kept", 3, [job("kept", figure("kept", "fine", value=1))]),
    ]
    start = time.monotonic()
    left, found = run(tmp_path, phases, seconds=10.0)
    assert time.monotonic() - start <= 10.0
    assert "kept" in found and 2 <= len(found) - 1 < 20
    assert {figure.key for figure in left} == set(keys(phases)) - set(found)
    assert not any("failed" in line for line in found.values()), "no time is no failure: another start measures it"


def test_a_figure_that_outlasts_the_run_is_stopped_in_time(tmp_path):
    start = time.monotonic()
    late = figure("late", "fine", 0.1, value=1, seconds=30)
    left, found = run(tmp_path, [Phase("a", 60, [job("a", late)])], seconds=5.0)
    assert time.monotonic() - start <= 5.0
    assert [figure.key for figure in left] == ["late"] and not found


def test_the_plan_fits_its_budget_and_names_every_peer():
    from benchmarks.gpu import peers

    phases = plan.whole_plan(tiny=False)
    assert sum(phase.seconds for phase in phases) <= 540
    assert len(set(keys(phases))) == len(keys(phases))
    assert all(callable(getattr(peers, name)) for name, _ in plan.PEERS.values())
    assert [phase.name for phase in plan.whole_plan(tiny=True)] == [phase.name for phase in phases]


def test_tile_sweep_has_whole_waves_only():
    """Of 128 × 256 output tiles on 132 multiprocessors; a last wave less than nine tenths full would not be one."""
    for setting, sizes in plan.TILES.items():
        for block, tile in sizes:
            outputs = [(block, tile)] if setting == "no grad" else [(block, plan.HIDDEN)]
            for rows, columns in outputs:
                count = -(-rows // 128) * -(-columns // 256)
                waves = count / 132
                assert waves / -(-count // 132) >= 0.9, (setting, block, tile, waves)


def test_tables_need_nothing_but_the_lines():
    time_of = {"ms": 10.0, "ms_p10": 9.5, "ms_p90": 11.0, "runs": 7}
    cell = {**time_of, "logp_error": 1e-6, "dx_error": 2e-3, "gib": 1.5, "per_token": True}
    product = "logits 32768 × 4096 × 151936, bf16"
    versions = {"torch": "2.11.0", "quack-kernels": "not installed"}
    head = {"run": "r", "started": "now", "commit": "abc", "kernels": "def", "versions": versions}
    states = [dict(sm_mhz=mhz, celsius=50, throttled="0x0") for mhz in (1755, 1980)]
    lines = [
        head,
        {"key": f"ceiling/{product}", **time_of, "tflops": 800.0, "card": states[0]},
        {"key": "ours/32768/151936/frozen", **cell, "ms": 120.0},
        {"key": "ours/32768/151936/frozen", **cell, "ms": 110.0, "card": states[1]},  # measured again
        {"key": "peer/quack/32768/151936/frozen", "failed": "Unavailable: quack"},
        {"key": "tests", "passed": 3, "failures": {"test_a": "boom"}, "skipped": {}, "measured": {}},
        {"key": "stack/resume", "resumes_bit_for_bit": True},
    ]
    text = tables([{**line, "on": "a card"} for line in lines])
    floor = 2 * 2 * 32768 * 4096 * 151936 / 800e12 * 1e3
    assert f"| floor: the products alone | {floor:.2f} ms |" in text
    assert f"110.00 ms (9.50 – 11.00, 7 runs), {110 / floor:.2f}×, 1.50 GiB, logp 1e-06, dX 2e-03 |" in text
    assert "120.00" not in text
    assert "sm_mhz 1755 – 1980, celsius 50 – 50, throttled 0x0 – 0x0" in text
    assert "| quack | Unavailable: quack |" in text
    assert f"| {product} | 800 TFLOP/s, 10.00 ms (9.50 – 11.00, 7 runs) | not measured |" in text
    assert "3 passed, 1 failed" in text and "boom" in text
    assert "resumes bit for bit True" in text and "| stack/step | not run |" in text


def test_again_measures_anew_and_only_what_was_named(tmp_path):
    phases = [Phase("a", 5, [job("a", figure("a/1", "fine", value=1), figure("b/1", "fine", value=1))])]
    run(tmp_path, phases)
    forget(Lines(tmp_path / "gpu.jsonl"), "a card", ["a/"])
    phases = [Phase("a", 5, [job("a", figure("a/1", "fine", value=2), figure("b/1", "fine", value=2))])]
    _, found = run(tmp_path, phases)
    assert found["a/1"]["ms"] == 2 and found["b/1"]["ms"] == 1


def test_two_starts_in_one_folder_are_refused(tmp_path):
    with (tmp_path / "gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [ROOT / "benchmarks" / "gpu.sh", "--tiny", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: another start writes to")
    assert not (tmp_path / "gpu.jsonl").exists()


def test_the_command_refuses_in_one_line_without_a_gpu_or_a_place(tmp_path):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    env.pop("OUT", None)
    for given, said in (([], "give --out FOLDER"), (["--table", str(tmp_path / "no")], "no such file")):
        done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", *given], env=env, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
