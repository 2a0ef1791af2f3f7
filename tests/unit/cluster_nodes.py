"""A supervised node as a process of its own, for the tests of what the supervisor does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

# Beats and patience are shorter than a cluster's. Node 0 leaves a file for each node that it has heard.
NODE = """
import os
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
from megatron_bvpo.cluster import supervise
from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.roll_call import RollCall
rank, nodes, port = map(int, sys.argv[1:4])
folder, silence, patience, code = Path(sys.argv[4]), float(sys.argv[5]), float(sys.argv[6]), sys.argv[7]
supervise.BEAT, supervise.GRACE, supervise.VICTIM_PATIENCE = 0.2, 1.0, patience
answer = RollCall.answer
def answer_and_note(book, topic, guest, body):
    told = answer(book, topic, guest, body)
    (folder / f"heard-{guest}").touch()
    return told
RollCall.answer = answer_and_note
job = Job(nodes=nodes, rank=rank, address="127.0.0.1", port=port, gpus=1, name=f"host{rank}")
logs = folder / "logs" / "run" / f"{rank:03d}"
logs.mkdir(parents=True, exist_ok=True)
env = {**os.environ, "BVPO_STOP_FILE": str(folder / "stop")}
sys.exit(supervise.Supervisor(job, [sys.executable, "-c", code], env, logs, silence).run())
"""
# A rank that ignores SIGTERM, as one that is stuck in a collective does; longer than any test waits.
STUCK = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(200)"
OBEYS = (
    "import os, time, pathlib; f = os.environ['BVPO_STOP_FILE']; print('up', flush=True)\n"
    "while not os.path.exists(f): time.sleep(0.05)\n"
    "pathlib.Path(f + '.done').write_text('{}')"
)
# How long a test waits for what must come; a machine under load may need most of it.
AT_MOST = 90


def start(
    folder: Path,
    code: str,
    rank: int = 0,
    nodes: int = 1,
    port: int = 0,
    silence: float = AT_MOST,
    patience: float = AT_MOST,
) -> subprocess.Popen:
    """A node whose run is the Python `code`.

    Args:
        silence: seconds without a beat until a node is lost; what a test waits for, where a node is.
        patience: seconds in which a run that has only lost its peers waits to hear whose fault it was.
    """
    command = [sys.executable, "-c", NODE, *map(str, (rank, nodes, port, folder, silence, patience)), code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)


def until_up(process: subprocess.Popen) -> None:
    assert process.stdout.readline().strip() == "up"


def until_heard(folder: Path, *ranks: int) -> None:
    """Until node 0 has had a beat of each of `ranks`, and so knows their names."""
    deadline = time.monotonic() + AT_MOST
    while missing := [rank for rank in ranks if not (folder / f"heard-{rank}").exists()]:
        assert time.monotonic() < deadline, f"node 0 has not heard of {missing}"
        time.sleep(0.05)
