"""Chains of tiny real processes, started as a controller of their own that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_bvpo.workflow.stages import Stage, to_json
from tests.distributed.cells import ROOT

# `count.py FILE N`: appends the numbers that are missing up to N, one each tenth of a second, and ends in order when
# asked; the last ones as soon as there is a file `go`. Two that write at once fail, and so does one that finds a number
# twice.
COUNT = """
import os, signal, sys, time
path, most = sys.argv[1], int(sys.argv[2])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
try:
    other = open(path + ".pid").read()
    if open(f"/proc/{other}/stat").read().rpartition(")")[2].split()[0] != "Z":
        sys.exit("another one writes " + path)
except OSError:
    pass
open(path + ".pid", "w").write(str(os.getpid()))
done = open(path).read().split() if os.path.exists(path) else []
assert done == [str(i) for i in range(len(done))], done
for i in range(len(done), most):
    time.sleep(0.1)
    while i > 5 and not asked and not os.path.exists(os.path.join(os.path.dirname(path), "go")):
        time.sleep(0.1)
    with open(path, "a") as file:
        file.write(f"{i}\\n")
    if asked and i + 1 < most:
        os.remove(path + ".pid")
        print("saved", flush=True)
        sys.exit(75)
os.remove(path + ".pid")
print("counted", flush=True)
"""
CONTROLLER = """
import json, sys
from pathlib import Path
from megatron_bvpo.errors import UserError
from megatron_bvpo.workflow.chain import run_chain
from megatron_bvpo.workflow.stages import from_json
try:
    stages = [from_json(found) for found in json.loads(Path(sys.argv[1]).read_text())]
    sys.exit(run_chain(stages, Path(sys.argv[2]), cores=int(sys.argv[3])).exit_code)
except UserError as e:
    print(e)
    sys.exit(2)
"""


def counting(folder: Path, name: str, most: int = 5, **more) -> Stage:
    """A stage that counts in `folder`, as a run that goes on where it was."""
    script = folder / "count.py"
    if not script.exists():
        script.write_text(COUNT)
    file = folder / name.replace("/", "-")
    return Stage(name, ("python", str(script), str(file), str(most)), **more)


def numbers(folder: Path, stage: Stage) -> list[int]:
    return [int(n) for n in (folder / stage.name.replace("/", "-")).read_text().split()]


class Controller:
    """A controller in a process of its own."""

    def __init__(self, stages: list[Stage], out: Path, cores: int = 2, **env: str):
        spec = out.parent / f"{out.name}.json"
        spec.write_text(json.dumps(to_json(stages)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, str(spec), str(out), str(cores)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        )  # fmt: skip

    def end(self, code: int = 0, seconds: float = 90) -> str:
        """What it said, when it has ended with `code`."""
        said, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == code, said
        return said

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, what: str, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
    return found


def kill_all(pids) -> None:
    """SIGKILL; one may end by itself when its parent has."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
