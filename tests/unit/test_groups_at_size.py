"""Gradient slices at the size of real jobs: 32 and 64 ranks count every parameter of the model exactly once.

One process plays every rank in turn (sized_ranks.py) with Megatron's own process groups, layers and DDP buffers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.sized_ranks import GRAMS

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "tp4-ep8": {"ranks": 32, "tp": 4, "ep": 8},
    "tp2-pp4-ep8": {"ranks": 64, "tp": 2, "pp": 4, "ep": 8},
    "tp2-pp2-cp2-ep4": {"ranks": 32, "tp": 2, "pp": 2, "cp": 2, "ep": 4},
    "tp2-pp2-ep4-etp2": {"ranks": 32, "tp": 2, "pp": 2, "ep": 4, "etp": 2},
    "tp4-ep1": {"ranks": 32, "tp": 4},
    "tp4-ep8-no-dist-opt": {"ranks": 32, "tp": 4, "ep": 8, "shards": False},
    "tp2-ep4-two-optimizers": {"ranks": 32, "tp": 2, "ep": 4, "instances": 2},
    "tp4-ep8-lora": {"ranks": 32, "tp": 4, "ep": 8, "lora": True},
    # the layouts of configs/qwen3_235b_a22b_thinking_lora_{4,8}nodes.yaml
    "tp4-pp2-ep8-lora": {"ranks": 32, "tp": 4, "pp": 2, "ep": 8, "lora": True},
    "tp4-pp2-cp2-ep8-lora": {"ranks": 64, "tp": 4, "pp": 2, "cp": 2, "ep": 8, "lora": True},
    "tp2-pp4-ep8-lora": {"ranks": 64, "tp": 2, "pp": 4, "ep": 8, "lora": True},
    "tp2-pp2-cp2-ep4-lora-no-dist-opt": {
        "ranks": 32,
        "tp": 2,
        "pp": 2,
        "cp": 2,
        "ep": 4,
        "lora": True,
        "shards": False,
    },
    "tp4-ep1-lora": {"ranks": 32, "tp": 4, "lora": True},
    "tp4-pp2-dense-tied": {"ranks": 32, "tp": 4, "pp": 2, "dense": True},
}
# fault: the layout that it is tried on
FAULTS = {
    "replicas counted on every rank": {"ranks": 8, "tp": 2, "ep": 4},
    "copies not divided": {"ranks": 8, "tp": 2, "ep": 4, "shards": False},
    "whole buffers": {"ranks": 8, "tp": 2, "ep": 4},
    "experts reduced as dense": {"ranks": 8, "tp": 2, "ep": 4},
    "marks as they come": {"ranks": 8, "tp": 2, "ep": 4, "lora": True},
}
# Two processes, as two cores allow.
SHARES = 2


@pytest.fixture(scope="module")
def counts() -> dict[str, dict]:
    jobs = {**LAYOUTS, **{fault: {**layout, "fault": fault} for fault, layout in FAULTS.items()}}
    names = sorted(jobs, key=lambda name: -jobs[name]["ranks"])
    shares = [names[i::SHARES] for i in range(SHARES)]
    env = {**os.environ, "BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.sized_ranks", *(json.dumps(jobs[name]) for name in share)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for share in shares
    ]
    found = {}
    for process, share in zip(started, shares, strict=True):
        text, _ = process.communicate(timeout=600)
        lines = [line.removeprefix("RESULT ") for line in text.splitlines() if line.startswith("RESULT ")]
        assert process.returncode == 0 and len(lines) == len(share), text[-4000:]
        found |= dict(zip(share, map(json.loads, lines), strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_is_counted_once(counts, layout):
    found = counts[layout]
    assert found["times"] == {"1.0": found["elements"]}, "how often: how many elements"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gram_matrices_are_those_of_the_whole_model(counts, layout):
    """C and D of three streams' known gradients, added up over the ranks as the one all-reduce does."""
    found = counts[layout]
    expected = [factor * found["squares"] for factor in GRAMS]
    assert found["measured"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(counts, fault):
    assert counts[fault]["times"] != {"1.0": counts[fault]["elements"]}
