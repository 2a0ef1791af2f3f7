"""The runs of the study: the product's own pipeline, in processes forked from one that has loaded it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.study.plan import BETA, Run
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

FLAGS = (
    "--model_type qwen3 --template qwen3 --tuner_type lora --lora_rank 32 --lora_alpha 32 --lora_dropout 0 "
    "--lr_decay_style constant --lr_warmup_fraction 0 --max_length 512 --logging_steps 1 --bvpo_empty own "
    f"--merge_lora false --no_save_optim true --no_save_rng true --split_dataset_ratio 0 --beta {BETA}"
)
GRADIENTS = "gradients.json"
SECOND_ORDER = 10  # a second round has the rows in another order


def adapter(name: str) -> Path:
    """Where a run's adapter is kept, in the study's folder."""
    return Path("adapters") / name


def argv_of(run: Run, rows: Path, study: Path = Path()) -> list[str]:
    """What comes after `swift rlhf --rlhf_type bvpo`, but for what a CPU needs and the layout; `study`: its folder."""
    order = run.seed + (SECOND_ORDER if run.after else 0)
    words = (
        f"--model {study / 'reasoner'} --dataset {rows} {FLAGS} {run.flags} --lr {run.rate} --seed {order} "
        f"--data_seed {order} --micro_batch_size {min(run.batch, 16)} --global_batch_size {run.batch} "
        f"--train_iters {run.steps} --save_steps {run.steps}"
    )
    if run.after:
        words += f" --adapters {study / adapter(run.after)}"  # the reference is the model without it
    if run.arm != "right-answers":  # which have no reference
        words += f" --bvpo_ref_cache {rows.parent / 'references'}"
    return words.split()


def train(run: Run, rows: Path, study: Path, folder: Path, *, ranks: int = 1, layout: str = "") -> Path:
    """The run's folder, with its checkpoint.

    Args:
        layout: flags of parallelism, for more than one rank. Gradients are recorded of one rank alone.
    """
    hook = "benchmarks.study.training:record_gradients" if ranks == 1 else "tests.distributed.recorders:nothing"
    argv = [*argv_of(run, rows, study), *layout.split(), *CPU_FLAGS]
    # Canaries warn of what a run does with its pairs, which is what is studied here.
    cell = Cell(run.name, argv, hook=hook, canaries=True)
    return run_cells(ranks, [cell], folder, timeout=7200)[run.name].folder


def record_gradients(base, folder: Path):
    """Keep ‖g‖² of every step, and ‖g − g'‖² with the step before (before clipping; the adapters' of one rank)."""

    class Recorder(base):
        def setup_model_training(self):
            super().setup_model_training()
            import torch

            step, last, found = self.optimizer.step, None, []

            def recording_step(*args, **kwargs):
                nonlocal last
                buffers = [buffer.grad_data for model in self.wrapped_models for buffer in model.buffers]
                now = torch.cat([data.flatten() for data in buffers]).double()
                apart = None if last is None else float((now - last).square().sum())
                found.append({"square": float(now.square().sum()), "apart": apart})
                last = now
                (folder / GRADIENTS).write_text(json.dumps(found))
                return step(*args, **kwargs)

            self.optimizer.step = recording_step

    return Recorder


def steps_of(folder: Path) -> list[dict]:
    """The run's steps: what it logged, and what was recorded of its gradients.

    A step's log line speaks of α as the step was mixed with; moments are there where it was a probe.
    """
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line and "iteration" in line]
    recorded = folder / GRADIENTS
    gradients = json.loads(recorded.read_text("utf-8")) if recorded.exists() else [{}] * len(lines)
    return [
        {"step": number, **{name: line[key] for name, key in LOGGED.items() if key in line}, **of_gradient}
        for number, (line, of_gradient) in enumerate(zip(lines, gradients, strict=True), 1)
    ]


LOGGED = {
    "loss": "loss",
    "trace_margin": "rewards/margins",
    "empty_margin": "empty/rewards/margins",
    "alpha": "alpha",
    "low": "alpha/low",
    "high": "alpha/high",
    "D": "moments/D",
    "X": "moments/X",
    "W": "moments/W",
    "V_t": "moments/V_t",
    "grad_norm": "grad_norm",
    "hits": "ref_cache/hits",
}
