"""An engine for the time of one command: healthy, never healthy, dying, and nothing left of it afterwards.

The engine is the tests' own server in a process; the command is the real `bvpo sample` or `bvpo eval`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_bvpo.sampling.samples import read_samples
from megatron_bvpo.workflow import engine_watch, leftovers
from tests.unit.chains import kill_all

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, SAMPLES = 20, 2
MARK = "BVPO_TEST_SERVING"


class Started:
    """`python -m megatron_bvpo.workflow.serving …` in a process, and all that it starts.

    Args:
        options: of the engine (openai_server.py).
        engine: a command for bash in its place; ENGINE in it is the usual one.
    """

    def __init__(self, folder: Path, *words: str, engine: str = "exec ENGINE", options: dict | None = None, **env: str):
        server = ROOT / "tests" / "unit" / "openai_server.py"
        told = json.dumps({"key": "KEY", **(options or {})}).replace("KEY", "'$VLLM_API_KEY'")
        usual = f"{sys.executable} {server} $BVPO_ENGINE_PORT {folder}/asked.log '{told}'"
        self.mark = uuid.uuid4().hex
        own = {"BVPO_ENGINE_COMMAND": engine.replace("ENGINE", usual), "BVPO_ENGINE_RESTARTS": "0", MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_bvpo.workflow.serving", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **own, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        told, _ = self.process.communicate(timeout=60)
        return self.process.returncode, told

    def left(self) -> list[str]:
        """Command lines of its processes that are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def wait_for(self, true) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, self.end()
            time.sleep(0.05)


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = [{"prompt": f"What is {i}?", "answer": f"{i % 3}"} for i in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "prompts": "prompts.jsonl",
        "out": "samples",
        "model": "m",
        "thinking_switch": "enable_thinking",
        "samples": SAMPLES,
        "max_tokens": 100,
        "concurrency": 4,
        "patience": 20,
        "engine": {"tensor_parallel_size": 8},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def answers(folder: Path) -> int:
    out = folder / "samples"
    return len(list(read_samples(out))) if (out / "settings.json").exists() else 0


ALL = PROMPTS * SAMPLES * 2
# It dies when it has been asked for the twelfth answer.
DIES = "touch asked.log; ENGINE & while [ $(wc -l <asked.log) -lt 12 ]; do sleep 0.05; done; kill -9 $!; exit 7"


def test_a_job_is_sampled_and_the_engine_ends(folder):
    started = Started(folder, "job.yaml", "--temperature", "0.5")
    code, told = started.end()
    assert code == 0 and "healthy after" in told, told
    assert answers(folder) == ALL and started.left() == []
    assert json.loads((folder / "samples" / "settings.json").read_text())["temperature"] == 0.5


def test_an_evaluation_is_another_command(folder):
    suite = {"datasets": [{"file": "prompts.jsonl", "name": "q", "judge": "exact"}]}
    (folder / "q.yaml").write_text(yaml.safe_dump(suite))
    words = "bvpo eval --suite q.yaml --model m --out eval --max_tokens 100 --thinking_switch enable_thinking".split()
    started = Started(folder, "job.yaml", "--", *words)
    code, told = started.end()
    assert code == 0 and (folder / "eval" / "scores.json").is_file(), told
    assert (folder / "eval" / "logs" / "engine.log").is_file() and started.left() == []


def test_the_command_s_code_is_passed_on(folder):
    words = "bvpo eval --suite gone.yaml --model m --out eval --max_tokens 100".split()
    code, told = (started := Started(folder, "job.yaml", "--", *words)).end()
    assert code == 2 and "gone.yaml" in told and started.left() == []


def test_an_engine_that_never_gets_healthy(folder):
    started = Started(folder, "job.yaml", engine="echo loading; sleep 60; true", BVPO_ENGINE_START_S="1")
    code, told = started.end()
    assert code == 1 and "no engine was healthy after 1 s" in told and "    loading" in told
    assert started.left() == []


def test_an_engine_that_cannot_start(folder):
    code, told = Started(folder, "job.yaml", engine="echo no GPU; exit 3").end()
    assert code == 1 and "ended with code 3" in told and "no engine is left" in told and "    no GPU" in told


def test_an_engine_that_dies_in_the_middle_is_started_again(folder):
    once = f"if [ ! -e once ]; then touch once; {DIES}; fi; exec ENGINE"
    started = Started(folder, "job.yaml", engine=once, options={"delay": 0.2}, BVPO_ENGINE_RESTARTS="1")
    code, told = started.end()
    assert code == 0 and "ended with code 7; start it again" in told, told
    assert answers(folder) == ALL and started.left() == []


def test_an_engine_that_dies_for_good_ends_the_command(folder):
    started = Started(folder, "job.yaml", engine=DIES, options={"delay": 0.2})
    code, told = started.end()
    assert code == 1 and "no engine is left" in told and 0 < answers(folder) < ALL, told
    assert started.left() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_reaches_the_command(folder, number):
    started = Started(folder, "job.yaml", options={"delay": 0.2})
    started.wait_for(lambda: answers(folder) > 5)
    started.process.send_signal(number)
    code, told = started.end()
    assert code == 128 + number, told
    assert answers(folder) < ALL and started.left() == []


def test_killed_nothing_is_left_and_the_same_command_goes_on(folder):
    started = Started(folder, "job.yaml", options={"delay": 0.2})
    started.wait_for(lambda: answers(folder) > 5)
    started.process.kill()
    deadline = time.monotonic() + 20
    while started.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started.left() == []
    had = answers(folder)
    code, told = Started(folder, "job.yaml").end()
    asked = (folder / "asked.log").read_text().splitlines()
    assert code == 0 and answers(folder) == ALL and 5 < had < ALL, told
    assert len(asked) - len(set(asked)) <= 4, "no more than what was in flight is asked again"


def test_a_worker_that_hides_its_environment_is_found_by_the_engine_s_log(folder):
    """As vLLM's, which write titles over it; left where the engine's watcher is killed, too."""
    stage = folder / "stages/ask"
    stage.mkdir(parents=True)
    started = Started(
        folder,
        "job.yaml",
        engine="env -i setsid sleep 100 & exec ENGINE",
        options={"delay": 0.2},
        BVPO_STAGE=str(stage),
    )
    started.wait_for(lambda: answers(folder) > 5)
    hidden = [pid for pid in leftovers.processes_of(stage) if psutil.Process(pid).cmdline() == ["sleep", "100"]]
    assert len(hidden) == 1
    kill_all(pid for pid in leftovers.processes_of(stage) if pid not in hidden)
    started.end()
    assert leftovers.processes_of(stage) == hidden and started.left() == []
    assert leftovers.end_processes_of(stage) == 1 and not running(*hidden)


def test_an_engine_that_does_not_end_is_killed_with_its_workers(tmp_path):
    """A worker in the background, and a shell that ignores SIGTERM."""
    code = f"import sys; sys.path.insert(0, {str(Path(engine_watch.__file__).parent)!r}); import engine_watch as w; "
    code += "w.PATIENCE_S = 1; sys.exit(w.main(sys.argv[1:]))"
    stubborn = "trap '' TERM; sleep 1000 & echo $$ $! >pids; while :; do sleep 0.2; done"
    command = [sys.executable, "-c", code, "3", "log", "bash", "-c", stubborn]
    watch = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE)
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text().endswith("\n")):
        time.sleep(0.05)
    watch.stdin.close()
    assert watch.wait(20) == 0
    assert not any(running(int(pid)) for pid in pids.read_text().split())


@pytest.mark.parametrize(
    ("words", "env", "told"),
    [
        ([], {}, "no job file given"),
        (["job.yaml", "--server", "http://x"], {}, "--server: is set by what starts the engine"),
        (["job.yaml", "--engine.port", "3"], {}, "--engine.port: is set by what starts the engine"),
        (["job.yaml", "--", "bvpo", "judge"], {}, "expected bvpo sample or bvpo eval behind --, found bvpo judge"),
        (["job.yaml", "--limit", "3", "--", "bvpo", "eval"], {}, "--limit: stands in front of --"),
        (["job.yaml", "--", "bvpo", "eval", "--model", "m"], {}, "no folder for the answers; add --out FOLDER"),
        (["job.yaml"], {"BVPO_ENGINE_RESTARTS": "many"}, "BVPO_ENGINE_RESTARTS: expected a whole number"),
        (
            ["job.yaml"],
            {"BVPO_ENGINE_COMMAND": "", "BVPO_VLLM_PYTHON": "/none/bin/python"},
            "BVPO_VLLM_PYTHON: there is no /none/bin/vllm; set BVPO_VLLM_PYTHON",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, words, env, told):
    code, said = Started(folder, *words, **env).end()
    assert code == 2 and told in said and len(said.splitlines()) == 1, said


def test_vllm_is_called_with_the_file_s_flags_and_none_of_our_packages(folder):
    vllm = folder / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text('#!/bin/bash\necho "CALLED $*"; echo "PYTHON ${PYTHONPATH:-none}"; exit 3\n')
    vllm.chmod(0o755)
    words = "--engine.lora_modules a=A b=B --engine.enable_lora --engine.tensor-parallel-size=2 --engine.model BASE"
    env = {"BVPO_ENGINE_COMMAND": "", "BVPO_VLLM_PYTHON": str(vllm.with_name("python"))}
    started = Started(folder, "job.yaml", *words.split(), "--model", "a", **env)
    assert started.end()[0] == 1
    called, python = (folder / "samples" / "logs" / "engine.log").read_text().splitlines()[-2:]
    assert called.startswith("CALLED serve BASE --host 127.0.0.1 --port ") and python == "PYTHON none"
    assert called.endswith("--tensor-parallel-size 2 --lora-modules a=A b=B --enable-lora")
