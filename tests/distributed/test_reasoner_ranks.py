"""The training stack runs the committed reasoner: its log-probs at TP 2 and PP 2 are transformers'."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_bvpo.rehearsal.reasoner import reasoner_folder
from megatron_bvpo.rehearsal.reasoner.problems import problems
from tests.distributed.cells import CPU_FLAGS, Cell, run_cells
from tests.distributed.hf_oracle import mean_logps


def problem_pairs(n: int) -> list[dict]:
    """Rows of the reasoner's own problems: right answers before wrong ones, in both modes."""
    found = []
    for problem in islice(problems(0, "train"), n):
        wrong = str(int(problem.answer) + 1)
        asked = {"role": "user", "content": problem.question}
        found.append(
            {
                "messages": [asked, {"role": "assistant", "content": problem.thinking}],
                "rejected_response": problem.thinking.replace(f"\n\n{problem.answer}", f"\n\n{wrong}"),
                "empty_response": problem.answer,
                "empty_rejected_response": wrong,
            }
        )
    return found


def test_log_probs_are_those_of_transformers(tmp_path):
    rows = problem_pairs(8)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        f"--model {reasoner_folder()} --model_type qwen3 --template qwen3 --dataset {tmp_path}/rows.jsonl "
        "--tensor_model_parallel_size 2 --sequence_parallel true --pipeline_model_parallel_size 2 --tuner_type full "
        f"--micro_batch_size 1 --global_batch_size {len(rows)} --train_iters 1 --logging_steps 1 --max_length 256 "
        f"--dataset_shuffle false --lr 1e-4 --bvpo_alpha 0.5 --eval_iters 0"
    )
    run = run_cells(4, [Cell("reasoner", [*flags.split(), *CPU_FLAGS])], tmp_path)["reasoner"]
    model = AutoModelForCausalLM.from_pretrained(reasoner_folder(), dtype=torch.float64)
    for name, expected in mean_logps(model, reasoner_folder(), rows).items():
        assert run.steps(name)[0] == pytest.approx(expected, rel=1e-5), name
