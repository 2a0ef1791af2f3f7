"""The logs of a run's ranks, and the first error in them."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

_OURS = re.compile(r"megatron-bvpo: error: .*")
# The last line of a Python traceback; torch puts the rank in front of it.
_RAISED = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Refused|Lost)\b.*)")
_TAIL = 200_000


# What a rank says that has only lost another one.
_VICTIM = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|communicator was aborted|timed? ?out|ChildFailedError",
    re.I,
)


def is_victim(message: str) -> bool:
    """Whether an error only tells that another rank is gone; also where no error is known."""
    return not message or bool(_VICTIM.search(message))


def first_error(folder: Path, old: Collection[Path] = ()) -> str:
    """What went wrong first on this node, as one line with the rank's log; empty where nothing is found.

    torchrun writes `<folder>/<run>/attempt_<n>/<local rank>/stderr.log`; `old` are runs of earlier attempts. The rank
    that wrote its error first is likely the cause: the others fail when it is gone.
    """
    found = []
    for run in sorted(set(folder.glob("*")) - set(old)):
        for file in run.rglob("stderr.log"):
            if line := error_line(file):
                found.append((file.stat().st_mtime, file, line))
    # A message of ours says what to do; a loss of a peer says nothing.
    found.sort(key=lambda item: (not _OURS.match(item[2]), is_victim(item[2]), item[0]))
    return f"{found[0][2]} [{found[0][1]}]" if found else ""


def error_line(file: Path) -> str:
    """The first error of ours in a log, else the end of its last traceback; empty where there is neither."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        if match := _OURS.search(line):
            return match.group(0)[:500]
    for line in reversed(lines):
        if match := _RAISED.match(line):
            return match.group(1)[:500]
    return ""
