"""From `train_step` to the loss in five files, each entered once; the README tells the same way."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.cells import CPU_FLAGS, ROOT, Cell, run_cells
from tests.distributed.oracle_runs import dense
from tests.distributed.way_recorder import Way

HOOK = "tests.distributed.way_recorder:record_way"
WAY = (
    "training/trainer.py",
    "training/step.py",
    "training/passes.py",
    "objective/stream_losses.py",
    "objective/preference.py",
)


@pytest.mark.slow
def test_five_files_each_entered_once(workshop, tmp_path):
    run = f"{dense(workshop)} --dataset {workshop.train} --tuner_type full --bvpo_alpha 0.3 --train_iters 2 "
    run += "--micro_batch_size 1 --global_batch_size 2 --max_length 512"
    result = run_cells(1, [Cell("way", [*run.split(), *CPU_FLAGS], hook=HOOK)], tmp_path)["way"]
    files = [file for file, _ in json.loads((result.folder / "way.json").read_text())]
    assert files[:3] == list(WAY[:3]), files
    # Megatron calls the pass for each of two micro-batches, and there is a loss for each of two streams.
    assert files[3:] == 2 * [WAY[3], WAY[4], WAY[4]], files


def test_the_readme_tells_this_way():
    section = (ROOT / "README.md").read_text().split("## Dive into the code")[1].split("\n## ")[0]
    places = [section.find(f"`{file}`") for file in WAY]
    assert -1 not in places and places == sorted(places)


FILES = {
    "top.py": "def go(x):\n    return loss(twice(x), half)\n\ndef half():\n    return 0.5\n",
    "below.py": "def twice(x):\n    return 2 * x\n\ndef loss(y, f):\n    return y * number() * f()\n",
    "side.py": "def number():\n    return 3\n",
}


def test_a_detour_is_noticed(tmp_path):
    """A file that is entered twice, one that is entered again from below, and one that is only asked for a number."""
    names: dict = {}
    for file, text in FILES.items():
        exec(compile(text, tmp_path / file, "exec"), names)
    with Way(tmp_path) as seen:
        names["go"](torch.ones(1, requires_grad=True))
    assert [call["file"] for call in seen.calls] == ["top.py", "below.py", "below.py", "side.py", "top.py"]
    assert seen.way() == [("top.py", "go"), ("below.py", "twice"), ("below.py", "loss")]
