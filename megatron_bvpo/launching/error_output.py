"""How a user error reaches the user: once, without a stack trace, as the last thing said.

torchrun answers a failed rank with a trace of its own. So the ranks of a node agree through a folder of the
launching process: the first that fails prints the message; where all of them fail, as with a wrong flag,
they leave with code 0, torchrun ends in silence, and the launching process exits with code 2. Where only some
fail, they leave with code 2, torchrun ends the others and says so, and the launching process repeats the
message.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from megatron_bvpo.errors import EXIT_CODE, UserError

# The launching process puts the path of an empty folder here.
FOLDER = "MEGATRON_BVPO_ERROR_FOLDER"
_MESSAGE = "message"
_SCAN = "scan"

# Seconds that a failed rank waits for the others of its node to fail too; they start some seconds apart.
GRACE = 10.0


def text(error: UserError) -> str:
    return f"megatron-bvpo: error: {error}"


def write(error: UserError) -> None:
    print(text(error), file=sys.stderr, flush=True)


def read(folder: Path) -> str | None:
    """The message that a rank left in the folder, None where no rank did."""
    try:
        return (folder / _MESSAGE).read_text(encoding="utf-8")
    except OSError:
        return None


def hand_over_scan(folder: Path, lines: list[str]) -> None:
    """Leave what the scan of the data files found for rank 0, so that they are not read twice."""
    (folder / _SCAN).write_text(json.dumps(lines), encoding="utf-8")


def handed_over_scan() -> list[str] | None:
    """What the launching process found in the data files; None where it did not look."""
    try:
        return json.loads(Path(os.environ[FOLDER], _SCAN).read_text(encoding="utf-8"))
    except (KeyError, OSError):
        return None


def leave(error: UserError) -> None:
    """End this rank because of `error`; does not return."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    folder = os.environ.get(FOLDER)
    if folder is None:
        # Started by torchrun alone. It ends the other ranks when the first of the node has left; a rank that
        # is alive after that is the only one that knows.
        if local_rank != 0:
            time.sleep(GRACE)
        write(error)
        all_failed = False
    else:
        first = _claim(Path(folder), text(error))
        # Told only now: the others may have lines of their log to write before they come here.
        all_failed = _all_failed(Path(folder), local_rank)
        if first:
            write(error)
    if not all_failed:
        _tell_torchrun(text(error))
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: process groups may be up, and their exit handlers wait for other ranks.
    os._exit(0 if all_failed else EXIT_CODE)


def _claim(folder: Path, message: str) -> bool:
    """Leave the message for the launching process; False where another rank was first."""
    try:
        with open(folder / _MESSAGE, "x", encoding="utf-8") as file:
            file.write(message)
    except FileExistsError:
        return False
    except OSError:
        pass  # the launching process is gone, and nobody coordinates
    return True


def _all_failed(folder: Path, local_rank: int) -> bool:
    """Whether every rank of a torchrun with one node comes here within the grace.

    With more nodes the others may still be running, and silence would let them wait for this one.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if ranks == 0 or os.environ.get("WORLD_SIZE") != str(ranks):
        return False
    deadline = time.monotonic() + GRACE
    try:
        (folder / f"rank{local_rank}").touch()
        while time.monotonic() < deadline:
            if all((folder / f"rank{rank}").exists() for rank in range(ranks)):
                return True
            time.sleep(0.05)
    except OSError:
        pass
    return False


def _tell_torchrun(message: str) -> None:
    """Put the message where torchrun's summary of failed ranks shows a trace."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    content = json.dumps({"message": {"message": message, "extraInfo": extra}})
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError:
        pass  # the summary then has no text; ours is on stderr already
