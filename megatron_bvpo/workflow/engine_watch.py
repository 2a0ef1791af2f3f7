"""Starts an engine, again where it dies, and ends it and all of its processes with the process that asked for it.

    python -I engine_watch.py RESTARTS LOG COMMAND …

Standard input is a pipe whose other end nobody but the asking process holds: it closes when that process ends, however
it ends, SIGKILL included. The engine has a session of its own, so that all of its workers can be ended together.
"""

import os
import select
import signal
import subprocess
import sys
import time

PATIENCE_S = 30  # between the request to end and the kill
PAUSE_S = 2  # before an engine is started again


def main(arguments: list[str]) -> int:
    """Exit code 0: it was asked to end; 1: the engine died once more than RESTARTS."""
    restarts, log, command = int(arguments[0]), arguments[1], arguments[2:]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for start in range(restarts + 1):
        if start and not _still_wanted(PAUSE_S):
            return 0
        with open(log, "ab") as out:
            engine = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, preexec_fn=_defaults
            )
        try:
            while engine.poll() is None:
                if not _still_wanted(0.2):
                    return 0
        finally:
            _end(engine)
        told = f"serving: the engine ended with code {engine.returncode}"
        print(f"{told}; start it again" if start < restarts else told, file=sys.stderr, flush=True)
    return 1


def _defaults() -> None:
    """In the engine: what is ignored here would be ignored there."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _still_wanted(seconds: float) -> bool:
    """Wait so long; false when the other end of the pipe has closed."""
    return not select.select([sys.stdin], [], [], seconds)[0]


def _end(engine: subprocess.Popen) -> None:
    """All of its session's first process group: asked first, killed when they do not go."""
    deadline = time.monotonic() + PATIENCE_S
    _signal(engine, signal.SIGTERM)
    while time.monotonic() < deadline and _signal(engine, 0):
        engine.poll()
        time.sleep(0.05)
    _signal(engine, signal.SIGKILL)
    engine.wait()


def _signal(engine: subprocess.Popen, number: int) -> bool:
    try:
        os.killpg(engine.pid, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
