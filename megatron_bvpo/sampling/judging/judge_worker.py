"""One process of a judge's pool: loads a function, then answers one item after the other (`judge_pool`)."""

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# The parent kills at the limit. Where it is gone, a process that waits sees it; one that computes is ended by the
# kernel after so many seconds more of processor time.
ORPHAN_GRACE_S = 2.0
LOOK_S = 1.0


def main(descriptor: int) -> None:
    """Answer until the parent closes its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's affair
    pipe = Connection(descriptor)
    try:
        function, arguments, time_limit, memory_gib, parent = pipe.recv()
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        _limit_memory(memory_gib)
        call, error = _load(function, arguments)
        pipe.send((None, error, time.process_time()))
        while error is None:
            payload = pipe.recv()
            # No handler: a process that is over it ends, whatever it is doing.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, time_limit + ORPHAN_GRACE_S)
            value, error_of_item = _call(call, payload)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send((value, error_of_item, time.process_time()))
    except (EOFError, OSError):
        pass


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def _limit_memory(gib: float) -> None:
    if gib:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]))


def _call(call: Callable[[Any], Any], payload: Any) -> tuple[Any, str | None]:
    try:
        return call(payload), None
    except MemoryError:
        return None, "out of memory"
    except Exception as error:
        return None, described(error)
    except SystemExit as error:
        return None, f"the judge called exit({error.code!r})"


def described(error: Exception) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _load(function: str, arguments: dict[str, Any]) -> tuple[Callable[[Any], Any] | None, str | None]:
    name, _, attribute = function.partition(":")
    try:
        module = importlib.import_module(name)
        prepare = getattr(module, "prepare", None)
        if prepare is not None:
            prepare(**arguments)
        return getattr(module, attribute), None
    except Exception as error:
        return None, str(error) if type(error).__name__ == "UserError" else described(error)
    except SystemExit:
        return None, f"{name} ends the process when it is imported"
