"""tests/kernels on this machine's device: what needs no group of ranks and no offline compile.

The tests run in parallel where pytest-xdist is there. The figure holds the counts, every failure by name, and what
tests measured (`record_property`: errors by the probability of the target).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.machine import ROOT

LEFT_OUT = ("test_tensor_parallel.py", "test_triton_compiles.py")
PROCESSES = 12
REPORT = "BVPO_GPU_TEST_REPORT"


def run(tiny: bool) -> dict:
    """Raises RuntimeError where pytest itself did not come to its end."""
    command = [sys.executable, "-m", "pytest", "-q", "-x" if tiny else "-q", "-p", "benchmarks.gpu.kernel_tests"]
    command += ["-p", "no:cacheprovider", "tests/kernels", *(f"--ignore=tests/kernels/{name}" for name in LEFT_OUT)]
    if tiny:
        command += ["-k", "awkward and float32 and frozen and triton or beyond or stratified"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory(prefix="gpu-tests-") as folder:
        report = Path(folder) / "report.json"
        env = {**os.environ, REPORT: str(report), "CI": "1"}  # CI: the same random cases on every machine
        done = subprocess.run(command, cwd=ROOT, env=env)
        if not report.exists() or done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}")
        return json.loads(report.read_text())


# ---------------------------------------------------------------- pytest's side, loaded with -p by `run`

_found: dict = {"passed": 0, "failures": {}, "skipped": {}, "measured": {}}


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        last = str(report.longrepr).strip().splitlines()[-12:]
        _found["failures"][report.nodeid] = "\n".join(last)[-800:]
    elif report.skipped:
        _found["skipped"][report.nodeid] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")
    elif report.when == "call":
        _found["passed"] += 1
    if report.when == "call" and report.user_properties:
        _found["measured"][report.nodeid] = dict(report.user_properties)


def pytest_sessionfinish(session) -> None:
    if os.environ.get(REPORT) and not hasattr(session.config, "workerinput"):
        Path(os.environ[REPORT]).write_text(json.dumps(_found))
