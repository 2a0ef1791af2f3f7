"""A run that is small enough to be started again and again: model, rows, and a YAML file as a user writes it.

`python -m tests.cluster.small_run FOLDER` makes them; two CPU ranks a step of about half a second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from tests.distributed.cells import CPU_FLAGS

STEPS = 8
SETTINGS = {
    "rlhf_type": "bvpo",
    "megatron": True,
    "model_type": "qwen3_moe",
    "template": "qwen3_thinking",
    "bvpo_alpha": 0.3,
    "tuner_type": "lora",
    "lora_rank": 4,
    "lora_dropout": 0.05,  # random states must come back too
    "lr": 1.0e-3,
    "lr_warmup_iters": 2,
    "micro_batch_size": 1,
    "global_batch_size": 6,
    "train_iters": STEPS,
    "logging_steps": 1,
    "save_steps": 1000,
    "eval_iters": 0,
    "max_length": 512,
    "merge_lora": False,
    "ENV": {"BVPO_REHEARSAL": "1", "OMP_NUM_THREADS": "1"},
}


def make_small_run(folder: Path, **more) -> Path:
    """The YAML file of a run in `folder`, which gets model and rows where it has none; `more` are its settings."""
    from megatron_bvpo.rehearsal.sample_data import make_sample_rows
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "train.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_sample_rows(16, seed=1)))
        make_tiny_model(folder / "model", kind="moe", vocab="trimmed", seed=0)
    flags = dict(zip((f.removeprefix("--") for f in CPU_FLAGS[::2]), CPU_FLAGS[1::2], strict=True))
    file = folder / "small.yaml"
    settings = {**flags, **SETTINGS, "model": str(folder / "model"), "dataset": [str(rows)], **more}
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def losses(run_folder: Path) -> dict[int, tuple]:
    """Step → what logging.jsonl says of it, without times; a step that was run twice must say the same twice."""
    found: dict[int, tuple] = {}
    for text in (run_folder / "logging.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "iteration" not in line:
            continue
        step = int(line["iteration"].split("/")[0])
        numbers = tuple((k, line[k]) for k in ("loss", "loss/trace", "loss/empty", "grad_norm", "learning_rate"))
        assert found.setdefault(step, numbers) == numbers, f"step {step} was logged twice, with other numbers"
    return found


if __name__ == "__main__":
    print(make_small_run(Path(sys.argv[1])))
