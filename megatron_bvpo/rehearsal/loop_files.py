"""What `launch/rehearse_loop.sh` starts from: the small reasoner in float32, prompts, and questions fresh to it.

    python -m megatron_bvpo.rehearsal.loop_files FOLDER PROMPTS QUESTIONS

FOLDER/reasoner, prompts-1.jsonl and prompts-2.jsonl (questions that the reasoner was trained on; a round each),
questions.jsonl (of the split that neither its training nor the pairs have) and questions.yaml, a suite of them.
Commands are then given in FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

JUDGE = "megatron_bvpo.sampling.judging.gym_judge:score"


def prepare(folder: Path, prompts: int, questions: int) -> None:
    """Write them; the same numbers write the same bytes."""
    from safetensors.torch import load_file, save_file

    from megatron_bvpo.rehearsal.reasoner import copy_reasoner, write_prompts

    # Merged models keep their base's type, and in bfloat16 small updates would round away.
    base = copy_reasoner(folder / "reasoner")
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for number in (1, 2):
        write_prompts(folder / f"prompts-{number}.jsonl", prompts, seed=20 + number, split="train")
    write_prompts(folder / "questions.jsonl", questions, seed=9, split="heldout")
    suite = {"datasets": [{"file": "questions.jsonl", "name": "problems", "judge": JUDGE, "threshold": 1}]}
    (folder / "questions.yaml").write_text(json.dumps(suite) + "\n", encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), *map(int, sys.argv[2:]))
