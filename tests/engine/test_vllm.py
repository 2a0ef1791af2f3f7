"""A real engine: 200 prompts are sampled in three modes, judged and paired; the pairs train their model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, run_cells
from tests.engine.vllm_server import serving

pytestmark = pytest.mark.slow
PROMPTS, SAMPLES, MODES = 200, 8, ("thinking", "empty", "short")
MORE_PROMPTS = 2000  # of two modes: a few hundred pairs, without which there is nothing to learn but their texts


def bvpo(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout[-3000:], done.stderr[-1500:], sep="\n")
    return done.stdout


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Path:
    """Folders with judged samples in `samples` (three modes) and `more` (two), and rows made of both in pairs.jsonl."""
    from megatron_bvpo.rehearsal.reasoner import reasoner_folder, write_prompts

    home = tmp_path_factory.mktemp("vllm")
    write_prompts(home / "samples.jsonl", PROMPTS, seed=5, split="heldout")
    write_prompts(home / "more.jsonl", MORE_PROMPTS, seed=6, split="train")
    how = f"--samples {SAMPLES} --temperature 1 --top_p 1 --max_tokens 160 --tokenizer {reasoner_folder()}"
    with serving(reasoner_folder(), "reasoner", home / "vllm.log") as address:
        for name, modes in (("samples", MODES), ("more", MODES[:2])):
            short = ("--short_budget", "12") if "short" in modes else ()
            asked = f"sample {name}.jsonl --out {name} --server {address} --model reasoner {how} --concurrency 64"
            bvpo(*asked.split(), *short, "--modes", *modes, cwd=home)
    for name in ("samples", "more"):
        bvpo("judge", name, "--with", "megatron_bvpo.sampling.judging.gym_judge:score", "--name", "gym", cwd=home)
    bvpo(*"pairs samples more --out pairs.jsonl --heldout 0.25".split(), cwd=home)
    return home


def test_every_answer_is_there_once(sampled):
    from megatron_bvpo.sampling.samples import THINKS, read_samples

    found = Counter((s.prompt_id, s.mode) for s in read_samples(sampled / "samples"))
    assert len(found) == PROMPTS * len(MODES) and set(found.values()) == {SAMPLES}
    for sample in read_samples(sampled / "samples"):
        assert sample.finish_reason in ("stop", "length") and sample.logprob_sum is not None
        traced = sample.mode != "empty" or THINKS in sample.marks
        assert sample.text.startswith("<think>") == traced, sample


def recipe_says(mode: str) -> float:
    """The accuracy in the reasoner's README: `| all (1,000 draws) | .643 [.613, .672] | .226 [.201, .253] |`."""
    from megatron_bvpo.rehearsal.reasoner import reasoner_folder

    (line,) = re.findall(r"^\| all .*$", (reasoner_folder().parent / "README.md").read_text(), re.M)
    return float(line.split("|")[{"thinking": 2, "empty": 3}[mode]].split()[0])


@pytest.mark.parametrize("mode", ["thinking", "empty"])
def test_accept_rates_are_the_recipe_s(sampled, mode):
    from megatron_bvpo.sampling.samples import read_judgements

    right = [j.right for j in read_judgements(sampled / "samples", "gym") if j.mode == mode and j.right is not None]
    rate, expected = sum(right) / len(right), recipe_says(mode)
    # Answers of one prompt go together: with all of a prompt alike, 200 prompts count and not 1,600 answers; the
    # recipe's own number comes from 1,000 draws.
    bound = 3 * (expected * (1 - expected) * (1 / PROMPTS + 1 / 1000)) ** 0.5
    print(f"{mode}: {rate:.3f}, the recipe says {expected:.3f}, bound {bound:.3f}")
    assert abs(rate - expected) < bound


@pytest.fixture(scope="module")
def trained(sampled):
    from megatron_bvpo.rehearsal.reasoner import reasoner_folder

    flags = (
        f"--model {reasoner_folder()} --model_type qwen3 --template qwen3 "
        f"--dataset {sampled / 'pairs.jsonl'} --val_dataset {sampled / 'pairs_heldout.jsonl'} "
        "--tuner_type lora --lora_rank 32 --lora_dropout 0 --lr 5e-4 --lr_decay_style constant "
        "--micro_batch_size 16 --global_batch_size 16 --train_iters 60 --eval_steps 30 --logging_steps 1 "
        "--max_length 512 --bvpo_eval_on_start true --bvpo_empty own"
    )
    hook = {"lora_scale": 0.0, "gradients": False, "save": False}
    (result,) = run_cells(1, [Cell("reasoner", [*flags.split(), *CPU_FLAGS], hook_args=hook)], sampled).values()
    return result


@pytest.mark.parametrize("stream", ["", "empty/"])
def test_accuracy_on_held_out_pairs_rises(sampled, trained, stream):
    rows = [json.loads(line) for line in (sampled / "pairs_heldout.jsonl").read_text().splitlines()]
    field = "empty_response" if stream else "rejected_response"
    pairs = sum(field in row for row in rows)
    assert pairs >= 40, "too few to tell"
    evaluations = [line for line in trained.log if "eval_loss" in line]
    before, after = (line[f"eval_{stream}rewards/accuracies"] for line in (evaluations[0], evaluations[-1]))
    print(f"{stream or 'trace/'}: {pairs} held-out pairs, {before:.3f} → {after:.3f}")
    assert before == 0.5, "the policy is the reference: ties"
    assert after > 0.5 + 2 * (0.25 / pairs) ** 0.5
