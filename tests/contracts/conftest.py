"""Console scripts in subprocesses, with stubs where training would begin.

A `sitecustomize` on PYTHONPATH puts small modules in the place of our pipeline and arguments, so that a run
ends where training would begin; RECORD=1 also stops ms-swift's launcher from starting anything, which leaves
its own line ``run sh: `…` ``.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.contracts.console import BIN, TORCHRUN

STUB = """
import dataclasses, os, subprocess, sys, types

@dataclasses.dataclass
class BvpoArguments:
    rlhf_type: str = "bvpo"
    model: str = ""
    lr: float = 0.1
    bvpo_alpha: str = "auto"

def bvpo_main():
    from megatron_bvpo.errors import UserError
    rank = os.environ.get("RANK", "0")
    if os.environ.get("FAIL") == rank:
        raise UserError("no rejected answer.", file="pairs.jsonl", line=7, remedy="Add one.")
    if "FAIL" in os.environ:
        import time
        time.sleep(60)  # waits in a collective, as a rank does whose partner has gone
    print(f"BVPO rank {rank} of {os.environ.get('WORLD_SIZE', '1')}: {sys.argv[1:]}", flush=True)

def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

module("megatron_bvpo.training.pipeline", bvpo_main=bvpo_main)
module("megatron_bvpo.training.arguments", BvpoArguments=BvpoArguments)
module("megatron_bvpo.rehearsal", install=lambda: print("stand-ins", flush=True))
if "RECORD" in os.environ:
    done = types.SimpleNamespace(returncode=0)
    real = subprocess.run
    subprocess.run = lambda args, **kw: done if args[0] == sys.executable else real(args, **kw)
"""


@pytest.fixture
def call(tmp_path):
    """Run a console script with the stubs; `env` is added to a clean environment."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB, encoding="utf-8")

    def run(*command: str, **env: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("BVPO_")}
        clean |= {"PYTHONPATH": str(tmp_path / "stub"), "CUDA_VISIBLE_DEVICES": "", **env}
        script = [str(BIN / command[0])] if (BIN / command[0]).exists() else [command[0]]
        return subprocess.run(
            [*script, *command[1:]], env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    return run


RUN_ALL = """
import contextlib, io, json, os, runpy, sys
if sys.argv[2] == "without":
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "RouteFinder"]
environ, lines = dict(os.environ), []
for command, env in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(environ | env)
    script = os.path.join(os.path.dirname(sys.executable), command[0])
    sys.argv, said = [script, *command[1:]], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    lines.append(said.getvalue())
print("RESULT" + json.dumps(lines))
"""


@pytest.fixture
def launches(call):
    """What the launchers would run for many (command, environment), one argument list each.

    The console scripts run one after another in one process: loading ms-swift takes seconds.
    """

    def run(cases: list[tuple[list[str], dict[str, str]]], hook: str = "with") -> list[list[str]]:
        result = call(sys.executable, "-c", RUN_ALL, json.dumps(cases), hook, RECORD="1")
        assert "RESULT" in result.stdout, result.stderr
        lines = json.loads(result.stdout.partition("RESULT")[2])
        found = [re.search(r"run sh: `(.*)`", line) for line in lines]
        assert all(found), lines
        return [match[1].split() for match in found]

    return run
