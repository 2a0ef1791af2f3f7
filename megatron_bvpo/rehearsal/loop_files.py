"""What `launch/rehearse_loop.sh` starts from: the small reasoner in float32, prompts, and questions fresh to it.

    python -m megatron_bvpo.rehearsal.loop_files FOLDER PROMPTS QUESTIONS

FOLDER/reasoner, prompts-1.jsonl and prompts-2.jsonl (questions that the reasoner was trained on; a round each),
questions.jsonl (of the split that neither its training nor the pairs have) and questions.yaml, a suite of them.
Commands are then given in FOLDER.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sys
from pathlib import Path

JUDGE = "megatron_bvpo.sampling.judging.gym_judge:score"


def prepare(folder: Path, prompts: int, questions: int) -> None:
    """Write them; the same numbers write the same bytes.

    What is there already stays, and what changes comes whole: a stage of killed rounds may be reading it.
    """
    from safetensors.torch import load_file, save_file

    from megatron_bvpo.rehearsal.reasoner import copy_reasoner, write_prompts

    # Merged models keep their base's type, and in bfloat16 small updates would round away.
    made = folder / f"reasoner.{os.getpid()}"
    base = copy_reasoner(made)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    _put(made, folder / "reasoner")
    for number in (1, 2):
        write_prompts(folder / f"prompts-{number}.jsonl", prompts, seed=20 + number, split="train")
    write_prompts(folder / "questions.jsonl", questions, seed=9, split="heldout")
    suite = {"datasets": [{"file": "questions.jsonl", "name": "problems", "judge": JUDGE, "threshold": 1}]}
    made = folder / f"questions.{os.getpid()}"
    made.write_text(json.dumps(suite) + "\n", encoding="utf-8")
    os.replace(made, folder / "questions.yaml")


def _put(made: Path, place: Path) -> None:
    """A folder into its place, unless that holds the same already."""
    if place.is_dir():
        names = sorted(file.name for file in made.iterdir())
        _, others, missing = filecmp.cmpfiles(made, place, names, shallow=False)
        if not others and not missing:
            shutil.rmtree(made)
            return
        shutil.rmtree(place)
    os.replace(made, place)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), *map(int, sys.argv[2:]))
