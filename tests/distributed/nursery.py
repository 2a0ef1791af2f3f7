"""The process behind `run_cells`: loads the stack once a test session, then forks the ranks of each batch of cells.

It never computes, so it has no threads, and forking it is safe (fork_worker.py asserts that). Commands are lines
of JSON on stdin, answers lines on stdout: `start` gives a process id, `poll` an exit code or null.
"""

from __future__ import annotations

import json
import os
import sys

from tests.distributed.fork_worker import ready_for_jobs


def main() -> None:
    answers = ready_for_jobs()
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            child = os.fork()
            if child == 0:
                answers.close()
                return become_rank(**command["start"])
            answer = child
        else:
            pid, status = os.waitpid(command["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)


def become_rank(spec: str, log: str, env: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    os.environ.update(env)
    from tests.distributed import cell_worker

    cell_worker.main(spec)


if __name__ == "__main__":
    main()
