"""Runs of `bvpo sample` against servers of the tests, and what they leave."""

import json
from collections import Counter
from pathlib import Path

from megatron_bvpo.cli import bvpo
from megatron_bvpo.sampling.samples import read_samples

HYBRID = ("--thinking_switch", "enable_thinking")


def write_prompts(path: Path, count: int, **more) -> Path:
    """A file of prompts with answers."""
    rows = [{"prompt": f"What is {i}?", "answer": f"{i % 3}", "family": "sum", **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(prompts, out, *servers, flags=HYBRID, samples=4, concurrency=8):
    """The command's exit code."""
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    command = ["sample", str(prompts), "--out", str(out), "--model", "m", "--max_tokens", "100"]
    command += ["--server", *addresses, "--samples", str(samples), "--concurrency", str(concurrency)]
    return bvpo([*command, *map(str, flags)])


def rows(folder) -> dict:
    """What is the same in every run."""
    found = list(read_samples(folder))
    assert len({s.key for s in found}) == len(found)
    return {s.key: s._replace(server=None, seconds=None) for s in found}


def keys(server) -> Counter:
    """How often a server was asked for each sample."""
    return Counter(request["seed"] for request in server.requests)
