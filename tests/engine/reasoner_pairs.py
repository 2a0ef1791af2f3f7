"""The small reasoner's own pairs: its prompts are sampled by a real engine, judged and paired, and the pairs train it.

Then both are asked questions of the split that neither the reasoner's own training nor the pairs had.

Seeds: questions 5 and 9 (held out) and 6 (that it was trained on), requests 0, training ms-swift's 42. An engine's
batches are not the same from run to run, so its answers, and what follows, differ a little.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from megatron_bvpo.rehearsal.reasoner import copy_reasoner, reasoner_folder, write_prompts
from tests.distributed.cells import CPU_FLAGS, Cell, CellResult, run_cells
from tests.engine.commands import bvpo
from tests.engine.vllm_server import serving

PROMPTS, SAMPLES, MODES = 200, 8, ("thinking", "empty", "short")
# Of two modes: a few hundred pairs, without which there is nothing to learn but their texts.
MORE_PROMPTS, MORE_SAMPLES = 2000, 8
JUDGE = "megatron_bvpo.sampling.judging.gym_judge:score"
QUESTIONS, REPEATS = 500, 4
SEQUENCES = 192


def sample(home: Path, name: str, prompts: int, seed: int, split: str, samples: int, modes: tuple[str, ...]) -> None:
    """A folder `name` of judged samples."""
    write_prompts(home / f"{name}.jsonl", prompts, seed=seed, split=split)
    how = f"--samples {samples} --temperature 1 --top_p 1 --max_tokens 160 --tokenizer {reasoner_folder()}"
    short = ("--short_budget", "12") if "short" in modes else ()
    with serving(reasoner_folder(), "reasoner", home / f"{name}.log", sequences=SEQUENCES) as address:
        asked = f"sample {name}.jsonl --out {name} --server {address} --model reasoner {how} --concurrency {SEQUENCES}"
        bvpo(*asked.split(), *short, "--modes", *modes, cwd=home)
    bvpo("judge", name, "--with", JUDGE, "--name", "gym", cwd=home)


def pairs(home: Path) -> None:
    """pairs.jsonl and pairs_heldout.jsonl, of questions that the reasoner knows from its own training."""
    sample(home, "more", MORE_PROMPTS, 6, "train", MORE_SAMPLES, MODES[:2])
    bvpo(*"pairs more --out pairs.jsonl --heldout 0.25".split(), cwd=home)


def train(home: Path) -> CellResult:
    """60 steps of LoRA on the pairs, evaluated on those held out; the checkpoint stays."""
    flags = (
        f"--model {reasoner_folder()} --model_type qwen3 --template qwen3 "
        f"--dataset {home / 'pairs.jsonl'} --val_dataset {home / 'pairs_heldout.jsonl'} "
        "--tuner_type lora --lora_rank 32 --lora_dropout 0 --lr 5e-4 --lr_decay_style constant "
        "--micro_batch_size 16 --global_batch_size 16 --train_iters 60 --eval_steps 30 --logging_steps 1 "
        "--max_length 512 --bvpo_eval_on_start true --bvpo_empty own "
        "--save_steps 60 --merge_lora false --no_save_optim true --no_save_rng true"
    )
    hook = {"lora_scale": 0.0, "gradients": False, "save": True}
    (result,) = run_cells(1, [Cell("trained", [*flags.split(), *CPU_FLAGS], hook_args=hook)], home).values()
    return result


def evaluate(home: Path, checkpoint: Path) -> None:
    """Folders `before` and `after` with scores.json, of the model and of the model with its adapter merged into it.

    Merged and in float32: of vLLM 0.32's code for CPUs, adapters take eight times as long, and bfloat16 would round.
    """
    write_prompts(home / "fresh.jsonl", QUESTIONS, seed=9, split="heldout")
    suite = {"datasets": [{"file": "fresh.jsonl", "name": "problems", "judge": JUDGE, "threshold": 1}]}
    (home / "fresh.yaml").write_text(json.dumps(suite))
    base = copy_reasoner(home / "base")
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    bvpo("export", str(checkpoint), "--model", str(base), "--merge", "--out", "merged", cwd=home)
    how = f"--suite fresh.yaml --repeats {REPEATS} --temperature 1 --top_p 1 --max_tokens 160 --concurrency {SEQUENCES}"
    for name, model in (("before", base), ("after", home / "merged")):
        with serving(model, "reasoner", home / f"{name}.log", sequences=SEQUENCES) as address:
            asked = f"eval --server {address} --model reasoner --out {name} --tokenizer {reasoner_folder()} {how}"
            bvpo(*asked.split(), cwd=home)
