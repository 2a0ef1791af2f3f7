"""The supervisor with commands that stand for the run: the roll call, stop requests, lost nodes, summaries, logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.roll_call import ENDED, RUNNING, RollCall
from megatron_bvpo.cluster.run_logs import first_error
from megatron_bvpo.cluster.supervise import NODE_LOST, STOPPED, Supervisor, descendants
from tests.unit.cluster_nodes import AT_MOST, OBEYS, STUCK, start, until_heard, until_up
from tests.unit.cluster_ports import free_pair

# Seconds without a beat until a node is lost: beats come every 0.2 s here, and a machine under load is late with them.
SILENCE = 4.0

# ---- the roll call


def test_a_silent_node_is_named():
    clock = [0.0]
    book = RollCall({0: "node 0 (a)", 1: "node 1 (b)", 2: "node 2"}, 60, now=lambda: clock[0])
    for rank, name in ((0, "a"), (1, "b")):
        assert book.answer("beat", rank, {"name": name, "state": RUNNING})["trouble"] is None
    clock[0] = 59
    assert book.trouble() is None
    clock[0] = 65
    book.answer("beat", 0, {"name": "a", "state": RUNNING})
    assert book.trouble() == "node 1 (b), node 2: not heard of for 65 s"
    book.answer("beat", 2, {"name": "c", "state": RUNNING})
    assert book.trouble() == "node 1 (b): not heard of for 65 s", "late, and not lost"
    assert [row["state"] for row in book.table()] == [RUNNING, "lost, silent for 65 s", RUNNING]


def test_a_node_that_fails_is_told_to_the_others_and_one_that_is_done_is_not_lost():
    clock = [0.0]
    book = RollCall({0: "node 0", 1: "node 1"}, 60, now=lambda: clock[0])
    book.answer("beat", 1, {"name": "b", "state": ENDED, "code": 0})
    clock[0] = 1000
    assert not book.over()
    assert book.answer("beat", 0, {"name": "a", "state": RUNNING})["trouble"] is None
    assert book.answer("beat", 0, {"name": "a", "state": ENDED, "code": 0})["over"]
    book.answer("beat", 1, {"name": "b", "state": ENDED, "code": 1, "message": "OutOfMemoryError: …"})
    assert book.trouble() == "node 1 (b) ended with exit code 1: OutOfMemoryError: …"


def test_the_first_error_of_the_ranks(tmp_path):
    def log(rank: int, text: str, age: float) -> None:
        file = tmp_path / "none_x" / "attempt_0" / str(rank) / "stderr.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, (time.time() - age, time.time() - age))

    assert first_error(tmp_path) == ""
    log(0, "Traceback …\nRuntimeError: [gloo] Connection closed by peer [10.0.0.2]:123\n", 30)
    log(1, "Traceback …\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nmore\n", 10)
    assert first_error(tmp_path).startswith(
        "torch.OutOfMemoryError: CUDA out of memory. ["
    ) and "/1/stderr.log]" in first_error(tmp_path)
    log(2, "megatron-bvpo: error: --lr: …\nRuntimeError: x\n", 1)
    assert first_error(tmp_path).startswith("megatron-bvpo: error: --lr: …")
    assert first_error(tmp_path, [tmp_path / "none_x"]) == "", "an earlier start's errors are no news"


# ---- the supervisor itself, as a process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_becomes_the_file_and_a_stop_has_its_own_code(tmp_path, number):
    process = start(tmp_path, OBEYS)
    until_up(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=AT_MOST)
    assert process.returncode == STOPPED, err
    assert "stopped on request, saved, can go on" in out
    assert (tmp_path / "stop").read_text().strip() == signal.Signals(number).name, "tells it from a user's touch"


def test_the_code_of_a_run_that_fails_is_kept(tmp_path):
    process = start(tmp_path, "raise SystemExit(9)")
    _, err = process.communicate(timeout=AT_MOST)
    assert process.returncode == 9 and "failed with exit code 9" in err
    assert json.loads((tmp_path / "logs" / "run" / "summary.json").read_text())["code"] == 9


def kill_node(process) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)


def two_stuck_nodes(folder) -> list:
    """Two nodes whose ranks listen to nothing, and which know of each other."""
    port = free_pair()
    nodes = [start(folder, STUCK, rank, 2, port, silence=SILENCE) for rank in range(2)]
    for node in nodes:
        until_up(node)
    until_heard(folder, 0, 1)
    return nodes


def test_a_node_that_dies_ends_the_others_and_is_named(tmp_path):
    nodes = two_stuck_nodes(tmp_path)
    kill_node(nodes[1])
    _, err = nodes[0].communicate(timeout=AT_MOST)  # the rank that does not listen would hold it up for longer
    nodes[1].communicate()
    assert nodes[0].returncode == NODE_LOST and "node 1 (host1): not heard of for" in err


def test_a_node_whose_node_0_is_gone_says_so(tmp_path):
    nodes = two_stuck_nodes(tmp_path)
    kill_node(nodes[0])
    _, err = nodes[1].communicate(timeout=AT_MOST)
    nodes[0].communicate()
    assert nodes[1].returncode == NODE_LOST and "node 0 (127.0.0.1) does not answer node 1 (host1)" in err


def test_a_node_that_fails_ends_the_others_with_its_name(tmp_path):
    port = free_pair()
    failing = start(tmp_path, "raise SystemExit(7)", 1, 2, port, patience=0.5)
    nodes = [start(tmp_path, STUCK, 0, 2, port), failing]
    outs = [node.communicate(timeout=AT_MOST) for node in nodes]
    assert nodes[0].returncode != 0 and nodes[1].returncode == 7, outs
    assert "node 1 (host1) ended with exit code 7" in outs[0][1]


def test_the_node_that_failed_is_named_and_not_the_one_that_only_lost_it(tmp_path):
    """Node 0 ends first, without a reason of its own; node 1 needs a second more to die of what went wrong."""
    port = free_pair()
    log, gone = tmp_path / "logs" / "run" / "001" / "none_a" / "attempt_0" / "0" / "stderr.log", tmp_path / "gone"
    dying = (
        f"import pathlib, time; log, gone = pathlib.Path({str(log)!r}), pathlib.Path({str(gone)!r})\n"
        "while not gone.exists(): time.sleep(0.05)\n"
        "time.sleep(1); log.parent.mkdir(parents=True)\n"
        "log.write_text('torch.OutOfMemoryError: CUDA out of memory\\n'); raise SystemExit(7)"
    )
    first = f"import pathlib; pathlib.Path({str(gone)!r}).touch(); raise SystemExit(1)"
    nodes = [start(tmp_path, first, 0, 2, port), start(tmp_path, dying, 1, 2, port)]
    outs = [node.communicate(timeout=AT_MOST) for node in nodes]
    assert "supervise:   node 1 (host1) ended with exit code 7: torch.OutOfMemoryError" in outs[0][1], outs
    assert "Exception" not in outs[0][1], outs


def test_two_nodes_that_finish_say_so_once(tmp_path):
    port = free_pair()
    nodes = [start(tmp_path, f"import time; time.sleep({rank})", rank, 2, port) for rank in range(2)]
    outs = [node.communicate(timeout=AT_MOST) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert "node 0 (host0): ended with 0" in outs[0][0] and "node 1 (host1): ended with 0" in outs[0][0]


def test_descendants_are_found_across_sessions():
    child = subprocess.Popen(["sh", "-c", "setsid sleep 30 & wait"])
    try:
        deadline = time.monotonic() + 5
        while not (found := descendants(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found and threading.active_count() >= 1
    finally:
        for pid in [*descendants(child.pid), child.pid]:
            os.kill(pid, signal.SIGKILL)
        child.wait()


def test_one_node_keeps_no_book(tmp_path):
    one = Job(nodes=1, rank=0, address="127.0.0.1", port=29500, gpus=1, name="host0")
    env = {**os.environ, "BVPO_STOP_FILE": str(tmp_path / "stop")}
    assert Supervisor(one, ["true"], env, tmp_path, 60).watch.book is None
