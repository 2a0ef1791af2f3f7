"""A pytest plugin for `launch/test.sh --all`: what has passed is not run again, and what was left out is told.

    pytest -p tests.progress --progress FOLDER …

FOLDER/passed holds the names of tests that passed in earlier goes, a line each; they are deselected. Every test that
passes is added the moment it has, so a go that is killed loses no more than the test it was at. FOLDER/left_out gets
a line for every test that was skipped, with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--progress", type=Path, help="folder of what has passed already and of what was left out")


def pytest_configure(config):
    folder = config.getoption("--progress")
    # Workers of pytest-xdist only deselect; their reports reach the process that started them.
    if folder is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Notes(folder))


def pytest_collection_modifyitems(config, items):
    folder = config.getoption("--progress")
    if folder is None:
        return
    # A worker that xdist starts in place of a crashed one must collect what the others did.
    passed = set(_lines(folder / "passed_before"))
    done = [item for item in items if item.nodeid in passed]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--progress") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # all of them have passed in an earlier go


class _Notes:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        passed = folder / "passed"
        (folder / "passed_before").write_text("".join(f"{line}\n" for line in _lines(passed)))
        self.passed, self.left_out = passed.open("a"), (folder / "left_out").open("a")
        self.called: set[str] = set()

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when == "call":
            self.called.add(report.nodeid)
        elif report.passed and report.nodeid in self.called:  # and nothing broke while it was taken down
            self._note(self.passed, report.nodeid)
        elif report.skipped:
            _, _, reason = report.longrepr
            self._note(self.left_out, f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")

    @staticmethod
    def _note(file, line: str) -> None:
        file.write(" ".join(line.splitlines()) + "\n")
        file.flush()


def _lines(path: Path) -> list[str]:
    """Whole lines of a file; one that a kill cut short names no test."""
    if not path.exists():
        return []
    return [line.rstrip("\n") for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
