"""A small reasoner: a Qwen3 of three million parameters that is sometimes right, with thinking and without.

    copy_reasoner('/tmp/reasoner')                                   # an ordinary Hugging Face folder
    write_prompts('/tmp/prompts.jsonl', 200, seed=1)                 # held-out problems, to be sampled
    megatron_bvpo.sampling.judging.gym_judge:score                   # judges the answers (bvpo judge --with)

Whatever samples, judges, pairs or trains can be tried on it without a download: its answers are its own, so right and
wrong ones of the same prompt differ as a real model's do. README.md beside this file has the recipe and its numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def reasoner_folder() -> Path:
    """The committed model: config.json, generation_config.json, model.safetensors (bfloat16), the tokenizer's files."""
    return Path(__file__).parent / "weights"


def copy_reasoner(folder: str | Path) -> Path:
    """Copy the model into `folder`, which need not exist; files of the same names are replaced. Returns the folder."""
    return Path(shutil.copytree(reasoner_folder(), folder, dirs_exist_ok=True))


def write_prompts(
    path: str | Path, n: int, *, seed: int = 0, split: str = "heldout", families: tuple[str, ...] = ()
) -> Path:
    """Write `n` prompts with different questions as JSON lines; the same arguments write the same bytes.

    A line has `id`, `messages` (one user turn), `answer`, `family`, and reasoning-gym's `metadata`.

    Args:
        split: `heldout`, or `train` for the questions that the reasoner was trained on.
        families: of problems; all of them by default.

    Raises:
        ValueError: an unknown split or family, or there are not so many different questions.
    """
    from megatron_bvpo.rehearsal.reasoner.problems import different_problems

    lines = [
        dict(
            id=f"{split}-{seed}-{number}",
            messages=[dict(role="user", content=problem.question)],
            answer=problem.answer,
            family=problem.family,
            metadata=problem.metadata,
        )
        for number, problem in enumerate(different_problems(n, seed, split, families))
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(unfinished, path)
    return path
