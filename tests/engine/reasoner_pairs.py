"""The small reasoner's own pairs: its prompts are sampled by a real engine, judged and paired, and the pairs train it.

Seeds: prompts 5 (held-out questions) and 6, requests 0, training ms-swift's 42. An engine's batches are not the same
from run to run, so its answers, and what follows, differ a little.
"""

from __future__ import annotations

from pathlib import Path

from megatron_bvpo.rehearsal.reasoner import reasoner_folder, write_prompts
from tests.distributed.cells import CPU_FLAGS, Cell, CellResult, run_cells
from tests.engine.commands import bvpo
from tests.engine.vllm_server import serving

PROMPTS, SAMPLES, MODES = 200, 8, ("thinking", "empty", "short")
MORE_PROMPTS = 2000  # of two modes: a few hundred pairs, without which there is nothing to learn but their texts
JUDGE = "megatron_bvpo.rehearsal.reasoner.judge:score"
RANK = 32


def sample_and_pair(home: Path) -> None:
    """Folders with judged samples in `samples` (three modes) and `more` (two), and rows made of both in pairs.jsonl and
    pairs_heldout.jsonl."""
    write_prompts(home / "samples.jsonl", PROMPTS, seed=5, split="heldout")
    write_prompts(home / "more.jsonl", MORE_PROMPTS, seed=6, split="train")
    how = f"--samples {SAMPLES} --temperature 1 --top_p 1 --max_tokens 160 --tokenizer {reasoner_folder()}"
    with serving(reasoner_folder(), "reasoner", home / "vllm.log") as address:
        for name, modes in (("samples", MODES), ("more", MODES[:2])):
            short = ("--short_budget", "12") if "short" in modes else ()
            asked = f"sample {name}.jsonl --out {name} --server {address} --model reasoner {how} --concurrency 64"
            bvpo(*asked.split(), *short, "--modes", *modes, cwd=home)
    for name in ("samples", "more"):
        bvpo("judge", name, "--with", JUDGE, "--name", "gym", cwd=home)
    bvpo(*"pairs samples more --out pairs.jsonl --heldout 0.25".split(), cwd=home)


def train(home: Path) -> CellResult:
    """60 steps of LoRA on the pairs, evaluated on those held out; the checkpoint stays."""
    flags = (
        f"--model {reasoner_folder()} --model_type qwen3 --template qwen3 "
        f"--dataset {home / 'pairs.jsonl'} --val_dataset {home / 'pairs_heldout.jsonl'} "
        f"--tuner_type lora --lora_rank {RANK} --lora_dropout 0 --lr 5e-4 --lr_decay_style constant "
        "--micro_batch_size 16 --global_batch_size 16 --train_iters 60 --eval_steps 30 --logging_steps 1 "
        "--max_length 512 --bvpo_eval_on_start true --bvpo_empty own "
        "--save_steps 60 --merge_lora false --no_save_optim true --no_save_rng true"
    )
    hook = {"lora_scale": 0.0, "gradients": False, "save": True}
    (result,) = run_cells(1, [Cell("trained", [*flags.split(), *CPU_FLAGS], hook_args=hook)], home).values()
    return result
