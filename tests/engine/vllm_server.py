"""`vllm serve` on a CPU, as a block."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 300  # fifty seconds on a quiet machine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(
    model: Path, name: str, log: Path, *flags: str, sequences: int = 64, plugins: Path | None = None
) -> Iterator[str]:
    """The base address of a vLLM that serves `model` as `name` until the block ends.

    Args:
        log: where it writes.
        flags: more of `vllm serve`.
        sequences: that it answers at once, whose prompts have 32,768 tokens at most; a small model's steps take as long
            for a few as for many.
        plugins: goes on its path.
    """
    python = Path(os.environ["BVPO_VLLM_PYTHON"])
    port = free_port()
    # A step has room for all sequences whole: vLLM 0.32 ends on a CPU where it puts off a part of a prompt whose
    # request has a seed ("CPU Generator does not use offset").
    settings = f"--enforce-eager --dtype float32 --max-model-len 512 --max-num-seqs {sequences}".split()
    settings += ["--max-num-batched-tokens", str(64 * 512)]
    command = [str(python.parent / "vllm"), "serve", str(model), "--served-model-name", name, "--host", "127.0.0.1"]
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "BVPO_REHEARSAL"))},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **({} if plugins is None else {"PYTHONPATH": str(plugins)}),
    }
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port), *settings, *flags], env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"vLLM was not ready after {START_S} s\n{log.read_text(errors='replace')[-4000:]}")
