"""`bvpo` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def bvpo(*arguments: str, cwd: Path) -> str:
    """Run it; returns its standard output. It must end well."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout[-3000:], done.stderr[-1500:], sep="\n")
    return done.stdout
