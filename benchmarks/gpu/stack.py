"""ms-swift's Megatron stack in bf16 on this machine, with the stand-ins in Transformer Engine's place.

`resume`: does a run repeat itself, and does a run from a checkpoint go on as if it had never stopped, bit for bit?
`step`: benchmarks/step.py, shortened. Stand-ins are plain PyTorch: ratios between the three ways mean something,
milliseconds do not.

The rows are a file that benchmarks/gpu_wheels.sh made, so that no package that makes rows has to be carried; without
that file they are made here.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks import step as steps
from benchmarks.gpu.machine import about
from benchmarks.gpu.wheels import FOLDER
from megatron_bvpo.rehearsal.tiny_models import make_tiny_model
from tests.distributed.cells import Cell, run_cells

# About 0.5 B parameters, made within a quarter of a minute: enough to keep a GPU busy. And 0.1 B, to be saved.
MIDDLE = steps.BIG | dict(num_layers=8, hidden_size=1024, head_dim=64, moe_intermediate_size=512)
SMALL = steps.BIG | dict(num_layers=4, hidden_size=256, head_dim=32, moe_intermediate_size=128)


def resume(tiny: bool) -> dict:
    """Four steps with a save after two, twice; and steps three and four from the first run's checkpoint."""
    with tempfile.TemporaryDirectory(prefix="gpu-stack-") as name:
        options = settings(tiny, Path(name), SMALL, train_steps=4)
        ours = [*steps.shared_flags(options), "--save_steps", "2", "--bvpo_alpha", "0.3", "--bvpo_logp_memory", "0.25"]
        exact = "tests.distributed.exact_recorder:record_exactly"
        runs = Path(name) / "runs"
        for run in ("whole", "whole-again", "resumed"):
            (runs / f"{run}.out").mkdir(parents=True)
        again = ["--finetune", "false", "--mcore_adapter", str(runs / "whole" / "checkpoint-2")]
        cells = [
            Cell("whole", ours, hook=exact),
            Cell("whole-again", ours, hook=exact),
            Cell("resumed", [*ours, *again], hook=exact),
        ]
        run_cells(1, cells, runs, timeout=400, forked=False)
        whole, repeated, resumed = (numbers(runs / f"{cell.name}.out") for cell in cells)
        return {
            "versions": about()["versions"],
            "steps": len(whole),
            "repeats_bit_for_bit": repeated == whole,
            "resumes_bit_for_bit": len(resumed) == 2 and resumed == whole[2:],
            "losses": losses(whole),
            "losses_repeated": losses(repeated),
            "losses_resumed": losses(resumed),
        }


def numbers(folder: Path) -> list[dict]:
    """What `record_exactly` wrote of every step."""
    lines = map(json.loads, (folder / "exact0.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


def losses(lines: list[dict]) -> list:
    return [read(line["metrics"].get("loss")) for line in lines]


def read(value):
    """Hexadecimal floats as numbers, in lists too."""
    if isinstance(value, list):
        return [read(part) for part in value]
    return float.fromhex(value) if isinstance(value, str) else value


def step(tiny: bool) -> dict:
    """benchmarks/step.py's three ways, one round of them: the first steps of each, which compile, do not count."""
    with tempfile.TemporaryDirectory(prefix="gpu-stack-") as name:
        options = settings(tiny, Path(name), MIDDLE, train_steps=3 if tiny else 10)
        rows = steps.measure(options, Path(name))
        ways = {row.pop("mode"): row for row in rows}
        return {"versions": about()["versions"], "ways": ways, "steps": options.steps, "warm-up": options.warmup}


def settings(tiny: bool, folder: Path, sizes: dict, *, train_steps: int) -> Namespace:
    gpu = torch.cuda.is_available() and not tiny
    vocab, sizes = ("real", sizes) if gpu else ("trimmed", {})
    global_batch = 16 if gpu else 2
    return Namespace(
        gpu=gpu,
        stand_ins=True,
        forked=False,  # as on a GPU
        steps=train_steps,
        rounds=1,
        warmup=3 if gpu else 1,
        ranks=1,
        length=4096 if gpu else 512,
        micro_batch=4 if gpu else 1,
        global_batch=global_batch,
        flags="",
        bf16=True,
        model=make_tiny_model(folder / "model", kind="moe", vocab=vocab, **sizes),
        rows=rows_of(folder / "rows.jsonl", train_steps * global_batch, scale=8 if gpu else 1),
    )


def rows_of(file: Path, count: int, *, scale: int) -> Path:
    """At least `count` rows, their traces `scale` times as long as the rehearsal's."""
    made = FOLDER / f"rows-{scale}.jsonl"
    if made.is_file():
        shutil.copy(made, file)
        return file
    from megatron_bvpo.rehearsal.sample_data import make_sample_rows

    rows = make_sample_rows(count, seed=0, length_scale=float(scale))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
