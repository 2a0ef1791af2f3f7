"""`launch/test.sh --all` goes on where it was stopped, and says what it left out (tests/progress.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = """
import os, signal, pytest

@pytest.mark.parametrize("text", ["a", "b c", "d\\n"])
def test_passes(text):
    pass

def test_waits_for_a_mend():
    assert os.path.exists("mended")

def test_is_left_out():
    pytest.skip("needs a GPU")

def test_is_stopped():
    if not os.path.exists("mended"):
        os.kill(os.getpid(), signal.SIGKILL)

def test_breaks_behind_itself(request):
    request.addfinalizer(lambda: None if os.path.exists("mended") else 1 / 0)
"""


@pytest.fixture
def go(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.progress", "--progress", "notes", *arguments]
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run


def notes(folder: Path, name: str) -> list[str]:
    return (folder / "notes" / name).read_text().splitlines()


def test_a_stopped_go_goes_on_until_nothing_is_left(go, tmp_path):
    assert go().returncode == -9
    first = notes(tmp_path, "passed")
    assert len(first) == 3 and all("test_passes" in line for line in first)
    assert notes(tmp_path, "left_out") == ["test_suite.py::test_is_left_out: needs a GPU"]

    (tmp_path / "mended").touch()
    second = go()
    assert second.returncode == 0 and "3 passed, 1 skipped, 3 deselected" in second.stdout, second.stdout
    assert len(notes(tmp_path, "passed")) == 6
    third = go("--deselect", "test_suite.py::test_is_left_out")
    assert third.returncode == 0 and "7 deselected" in third.stdout, third.stdout


def test_what_failed_or_broke_behind_itself_runs_again(go, tmp_path):
    chosen = "waits or passes or breaks"
    assert go("-k", chosen).returncode == 1
    assert len(notes(tmp_path, "passed")) == 3
    again = go("-k", chosen)
    assert again.returncode == 1 and "1 failed" in again.stdout and "1 error" in again.stdout


def test_workers_share_the_notes_and_a_name_cut_short_is_none(go, tmp_path):
    (tmp_path / "mended").touch()
    assert go("-n", "2").returncode == 0
    passed = tmp_path / "notes" / "passed"
    assert len(set(notes(tmp_path, "passed"))) == 6
    passed.write_text(passed.read_text()[:-2])
    assert "1 passed, 1 skipped, 5 deselected" in go().stdout
