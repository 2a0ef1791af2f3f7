"""An engine on this machine for the time of one command that asks it: launch/sample.sbatch without Slurm.

    python -m megatron_bvpo.workflow.serving FILE.yaml [--engine.KEY VALUE …] [--flag value …]
    python -m megatron_bvpo.workflow.serving FILE.yaml [--engine.KEY VALUE …] -- bvpo eval --suite math --out DIR …

FILE.yaml is a sampling job (sampling/asking/job_file.py has the words). The engine is started on a free port of this
machine with a key of its own, and the command, which gets both, runs when it is healthy. The exit code is the
command's; 1: no engine became healthy, or none is left. However this process ends, its engine ends, too.

    BVPO_ENGINE_COMMAND   another engine: a command for bash that listens on 127.0.0.1:$BVPO_ENGINE_PORT and serves
                          $BVPO_ENGINE_MODEL as $BVPO_ENGINE_NAME                               (vllm serve …)
    BVPO_VLLM_PYTHON      the Python of an environment with vLLM of its own        (empty: `vllm` on PATH)
    BVPO_ENGINE_START_S   seconds until it must be healthy                                       (1800)
    BVPO_ENGINE_RESTARTS  how often an engine that died is started again                         (3)
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_bvpo.errors import EXIT_CODE, UserError
from megatron_bvpo.sampling.asking.job_file import JobLine, engine_command, read_line
from megatron_bvpo.workflow import engine_watch
from megatron_bvpo.workflow.leftovers import note_engine_log

HOST = "127.0.0.1"
_BVPO = "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())"
_TOLD_LINES = 15


def main(arguments: list[str]) -> int:
    from megatron_bvpo.launching import error_output

    try:
        line = read_line(arguments)
        start_s, restarts = _number("BVPO_ENGINE_START_S", 1800), _number("BVPO_ENGINE_RESTARTS", 3)
        port, key = _free_port(), secrets.token_hex(24)
        engine = Engine(line, port, key, _log_file(line.out), restarts)
        return Serving(engine, line.client, key).run(start_s)
    except UserError as error:
        error_output.write(error)
        return EXIT_CODE


class Engine:
    """The engine's watcher, which ends it when this process ends (engine_watch.py).

    Args:
        port, key: where it listens, what it asks for.
        log: what it says is added there.
        restarts: how often it is started again.
    """

    def __init__(self, line: JobLine, port: int, key: str, log: Path, restarts: int) -> None:
        self.address, self.port, self.log = f"http://{HOST}:{port}/v1", port, log
        env = {**os.environ, "VLLM_API_KEY": key, "BVPO_ENGINE_PORT": str(port)}
        env |= {"BVPO_ENGINE_MODEL": line.model, "BVPO_ENGINE_NAME": line.name}
        own = os.environ.get("BVPO_ENGINE_COMMAND")
        if own:
            command = ["bash", "-c", own]
        else:
            program = _vllm()
            command = engine_command(line, port, host=HOST, program=program)
            if os.environ.get("BVPO_VLLM_PYTHON"):  # its packages are not ours
                env = {k: v for k, v in env.items() if not k.startswith(("PYTHON", "BVPO_REHEARSAL"))}
        with log.open("a", encoding="utf-8") as out:
            out.write(f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
            self._begin = out.tell()
        note_engine_log(log)
        # By its path and isolated: the environment is the engine's.
        watch = [sys.executable, "-I", engine_watch.__file__, str(restarts), str(log), *command]
        # A lock that this process was started with is theirs, too: whoever waits for it finds nothing running.
        self._watch = subprocess.Popen(watch, env=env, stdin=subprocess.PIPE, start_new_session=True, close_fds=False)

    def ended(self) -> bool:
        return self._watch.poll() is not None

    def healthy(self) -> bool:
        """Whether its /health says 200."""
        asked = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            asked.request("GET", "/health")
            return asked.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            asked.close()

    def last_words(self) -> str:
        """The end of what it said since this process started it."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-_TOLD_LINES:])

    def end(self) -> None:
        """Returns when all of it has ended."""
        self._watch.stdin.close()
        self._watch.wait()


class Serving:
    """One command and its engine; SIGTERM, SIGINT and SIGUSR1 ask the command to end in order."""

    def __init__(self, engine: Engine, words: list[str], key: str) -> None:
        self.engine = engine
        self._command = [sys.executable, "-c", _BVPO, *words, "--server", engine.address]
        self._key = key
        self._client: subprocess.Popen | None = None
        self._asked: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask_to_end)

    def run(self, start_s: int) -> int:
        try:
            reason = self._wait_until_healthy(start_s)
            if self._asked:
                return 128 + self._asked
            if reason:
                return self._fail(reason)
            return self._ask()
        finally:
            self.engine.end()

    def _wait_until_healthy(self, start_s: int) -> str:
        """Why it is not, or ''."""
        began = time.monotonic()
        _say(f"an engine starts at {self.engine.address}; its log is {self.engine.log}")
        while not self.engine.healthy():
            if self._asked:
                return ""
            if self.engine.ended():
                return "no engine is left"
            if time.monotonic() - began >= start_s:
                return f"no engine was healthy after {start_s} s (BVPO_ENGINE_START_S)"
            time.sleep(0.5)
        _say(f"healthy after {time.monotonic() - began:.0f} s")
        return ""

    def _ask(self) -> int:
        # A session of its own: Ctrl-C in a terminal reaches it once, through this process.
        self._client = subprocess.Popen(
            self._command,
            env={**os.environ, "OPENAI_API_KEY": self._key},
            start_new_session=True,
            close_fds=False,
            preexec_fn=_end_with_parent,
        )
        if self._asked:
            self._ask_to_end(self._asked)
        while self._client.poll() is None:
            if self.engine.ended() and not self._asked:
                self._ask_to_end(signal.SIGTERM)
                self._client.wait()
                return self._fail("no engine is left")
            time.sleep(0.1)
        code = self._client.returncode
        return 128 - code if code < 0 else code

    def _ask_to_end(self, number: int, _frame=None) -> None:
        self._asked = number
        if self._client is not None and self._client.poll() is None:
            self._client.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _fail(self, reason: str) -> int:
        _say(f"{reason}; the end of {self.engine.log}:\n{self.engine.last_words()}")
        return 1


def _end_with_parent() -> None:
    """In the new process: the kernel sends it SIGTERM when the process that started it ends, however it ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _vllm() -> str:
    python = os.environ.get("BVPO_VLLM_PYTHON")
    program = str(Path(python).parent / "vllm") if python else shutil.which("vllm")
    if program and os.access(program, os.X_OK):
        return program
    raise UserError(
        f"there is no {program}" if program else "there is no vllm on PATH",
        field="BVPO_VLLM_PYTHON" if python else None,
        remedy="set BVPO_VLLM_PYTHON to the Python of an environment with vLLM, or set BVPO_ENGINE_COMMAND",
    )


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdigit():
        raise UserError(f"expected a whole number, found {text!r}", field=variable)
    return int(text)


def _log_file(out: str) -> Path:
    logs = Path(out) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", file=str(logs), field="--out") from None
    return logs / "engine.log"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _say(text: str) -> None:
    print(f"serving: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
