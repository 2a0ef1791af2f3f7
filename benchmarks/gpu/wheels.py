"""Packages that a bare machine lacks, from the folder that benchmarks/gpu_wheels.sh filled.

They go to a folder of their own in front of what the machine has, while the first phases measure: those need none.
"""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.machine import ROOT

PYTHON = (3, 12)  # what the wheels are for
FOLDER = Path(os.environ.get("BVPO_GPU_WHEELS", ROOT / ".gpu-wheels"))


class Wheels:
    def __init__(self):
        self.process, self.site = None, None

    def start(self, folder: Path) -> None:
        wheels = sorted(FOLDER.glob("*.whl"))
        if not wheels or sys.version_info[:2] != PYTHON:
            return  # what is installed has to do
        self.site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        pip += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(self.site), *map(str, wheels)]
        self.process = subprocess.Popen(pip, stdout=subprocess.DEVNULL, stderr=sys.stderr)

    def path(self, until: float) -> str:
        """PYTHONPATH with the wheels, once they are there (or as they are at `until`)."""
        if self.process is not None:
            try:
                self.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
        return os.pathsep.join(str(part) for part in (self.site, ROOT) if part)

    def found(self, package: str, until: float) -> bool:
        """Whether a job of ours could import it; nothing is imported."""
        folders = [*self.path(until).split(os.pathsep), *sys.path]
        return importlib.machinery.PathFinder.find_spec(package, folders) is not None

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
