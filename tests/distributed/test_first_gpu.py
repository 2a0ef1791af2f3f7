"""launch/first_gpu.sh --cpu, a short part of it: four ranks equal one, and a planted fault is a failed line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.lines import Lines

ROOT = Path(__file__).resolve().parents[2]
KEY = "float32 equals the stand-ins"


def first_gpu(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [ROOT / "launch" / "first_gpu.sh", "--cpu", "--out", folder, "--only", "float32", *options]
    env = {**os.environ, "BVPO_PYTHON_BIN": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)


def test_a_planted_fault_fails_and_a_sound_layout_passes(tmp_path):
    """The second start has the first one's reference: only its own four ranks are started."""
    broken = first_gpu(tmp_path, "--ranks", "1", "--plant", "float32", "1e-3")
    assert broken.returncode == 1, broken.stderr[-2000:]
    assert f"| {KEY} | **FAILED** |" in broken.stdout and "What to do:" in broken.stdout
    sound = first_gpu(tmp_path, "--ranks", "4")
    assert sound.returncode == 0, sound.stdout + sound.stderr[-2000:]
    assert "reference:" not in sound.stdout
    lines = Lines(tmp_path / "first-gpu.jsonl")
    log_prob, bound = lines.figures("4 CPU ranks")[KEY]["all"]["log-prob of a sequence, relative"]
    assert 0 < log_prob <= bound / 5, "four ranks round otherwise than one, and far less than the bound"
    assert lines.figures("1 CPU ranks")[KEY]["number"] > 20 * bound
