"""How a run ends on a node: no process is left behind, and a stop does not wait for an evaluation."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

from megatron_bvpo.cluster import supervise
from megatron_bvpo.cluster.nodes import Job
from megatron_bvpo.cluster.supervise import _is_alive
from tests.unit.cluster_nodes import AT_MOST, start, until_up

# A launcher that starts two ranks in sessions of their own, which write down who they are and listen to nothing.
LAUNCHER = """
import pathlib, signal, subprocess, sys, time
rank = (
    "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
    "pathlib.Path({folder!r}, f'rank{{os.getpid()}}').touch(); time.sleep(200)"
)
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
while len(list(pathlib.Path({folder!r}).glob("rank*"))) < 2:
    time.sleep(0.05)
print("up", flush=True)
{then}
"""


def ranks_alive(folder: Path) -> list[int]:
    pids = [int(file.name.removeprefix("rank")) for file in folder.glob("rank*")]
    assert len(pids) == 2
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and _is_alive(pid)]


def test_ranks_outlive_neither_their_launcher_nor_the_run(tmp_path):
    """Ranks that ignore SIGTERM, below a launcher that obeys it: then nothing leads from the launcher to them."""
    process = start(tmp_path, LAUNCHER.format(folder=str(tmp_path), then="time.sleep(200)"))
    until_up(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=AT_MOST)
    assert process.returncode == 130 and not ranks_alive(tmp_path)


def test_an_interrupt_before_the_start_has_returned_leaves_no_ranks(tmp_path, monkeypatch):
    """The launcher runs already and Popen has not come back: seen on a machine with much to do."""
    real = subprocess.Popen

    def interrupted(*args, **options):
        process = real(*args, **options)
        while len(list(tmp_path.glob("rank*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return process

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)  # pytest's own process keeps its other handlers
    monkeypatch.setattr(supervise.subprocess, "Popen", interrupted)
    monkeypatch.setattr(supervise, "GRACE", 1.0)
    logs = tmp_path / "logs" / "run" / "000"
    logs.mkdir(parents=True)
    command = [sys.executable, "-c", LAUNCHER.format(folder=str(tmp_path), then="time.sleep(60)")]
    env = {**os.environ, "BVPO_STOP_FILE": str(tmp_path / "stop")}
    alone = Job(nodes=1, rank=0, address="127.0.0.1", port=0, gpus=1, name="host0")
    try:
        assert supervise.Supervisor(alone, command, env, logs, 2.0).run() == 130
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGINT, before)
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # pytest's own process adopts no orphans of other tests
    assert not ranks_alive(tmp_path)


def test_a_launcher_that_dies_by_itself_leaves_no_ranks(tmp_path):
    process = start(tmp_path, LAUNCHER.format(folder=str(tmp_path), then="raise SystemExit(9)"))
    _, err = process.communicate(timeout=AT_MOST)
    assert process.returncode == 9, err
    assert not ranks_alive(tmp_path)


def test_a_stop_leaves_an_evaluation_out(monkeypatch):
    """ms-swift evaluates before it saves. Its modules are stood in for: they take seconds to import."""
    for name in ("swift", "swift.megatron", "swift.megatron.callbacks", "swift.megatron.callbacks.base", "swift.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class Callback:
        def __init__(self, trainer):
            self.trainer, self.state, self.args = trainer, trainer.state, trainer.args

    sys.modules["swift.megatron.callbacks.base"].MegatronCallback = Callback
    sys.modules["swift.utils"].get_current_device = lambda: "cpu"
    sys.modules["swift.utils"].get_logger = lambda: logging.getLogger("stand-in")
    file = Path(supervise.__file__).parents[1] / "host" / "stop_signal.py"
    spec = importlib.util.spec_from_file_location("stop_signal_alone", file)
    stop_signal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stop_signal)
    state = types.SimpleNamespace(iteration=3, should_save=False, should_log=False, should_eval=True)
    groups = types.SimpleNamespace(any_rank=lambda flag, device: flag)
    trainer = types.SimpleNamespace(state=state, args=types.SimpleNamespace(train_iters=9), groups=groups)
    callback = stop_signal.StopCallback(trainer)
    callback.on_step_end()
    assert state.should_eval and not state.should_save
    callback.request.reason = "SIGUSR1"
    callback.on_step_end()
    assert state.should_save and not state.should_eval
