"""The reasoner's own pairs: sampled in this process, judged by `bvpo judge`, paired by `bvpo pairs`.

A seed draws its own questions, of those that the reasoner was trained on, and its own answers. Only rows with a pair in
both modes stay: then the two sets are as large, and α = .5 is DPO on their concatenation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_bvpo.data.whole_files import written_whole
from megatron_bvpo.rehearsal.loop_files import JUDGE
from megatron_bvpo.rehearsal.reasoner.evaluate import is_right
from megatron_bvpo.rehearsal.reasoner.problems import Problem, different_problems
from megatron_bvpo.rehearsal.reasoner.sampling import Answer, Reasoner, load_reasoner, sample
from megatron_bvpo.rehearsal.reasoner.tokens import END, MODES
from megatron_bvpo.sampling.samples import PROMPTS, SAMPLES, SETTINGS, TRUNCATED, Prompt, Sample, write_shard

MAX_TOKENS = 128


def make_pairs(
    folder: Path,
    model: Path,
    seed: int,
    prompts: int,
    samples: int,
    *,
    split: str = "train",
    adapter: Path | None = None,
) -> Path:
    """`folder/rows.jsonl`, made once.

    Args:
        model, adapter: whose answers they are.
        prompts: how many questions of `split` are asked.
        samples: answers to each, in each mode. `bvpo pairs` makes four pairs a question at most.
    """
    rows = folder / "rows.jsonl"
    if rows.is_file():
        return rows
    asked = folder / "samples"
    shutil.rmtree(asked, ignore_errors=True)
    problems = different_problems(prompts, 1000 + seed, split)
    _sample(asked, load_policy(model, adapter), seed, problems, samples)
    _bvpo("judge", asked, "--with", JUDGE, "--name", "gym")
    _bvpo("pairs", asked, "--out", folder / "pairs.jsonl", "--max_pairs_per_prompt", 4, "--seed", seed, "--overwrite")
    whole = [line for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines() if _has_both(json.loads(line))]
    with written_whole(rows) as file:
        file.write("\n".join(whole) + "\n")
    return rows


def _sample(folder: Path, reasoner: Reasoner, seed: int, drawn: list[Problem], samples: int) -> None:
    """A folder as `bvpo sample` leaves it behind, of the questions that have a pair of answers without thinking."""

    def ask(problems: list[Problem], mode: str) -> list[list[Answer]]:
        questions = [problem.question for problem in problems]
        return sample(reasoner, questions, mode, n=samples, seed=seed, max_tokens=MAX_TOKENS)

    quick = [(problem, of_one) for problem, of_one in zip(drawn, ask(drawn, "empty"), strict=True)]
    # The rows of the others would be left out for want of an empty pair, and traces are what costs.
    quick = [(problem, of_one) for problem, of_one in quick if len({is_right(problem, a.final) for a in of_one}) == 2]
    problems = [problem for problem, _ in quick]
    answers = {"thinking": ask(problems, "thinking"), "empty": [of_one for _, of_one in quick]}
    names = [f"{seed}-{number}" for number in range(len(problems))]
    of_prompts = [
        Prompt(
            prompt_id=name,
            messages=[{"role": "user", "content": problem.question}],
            answer=problem.answer,
            source=f"problems.py:{number}",
            columns={"family": problem.family, "metadata": problem.metadata},
        )
        for number, (name, problem) in enumerate(zip(names, problems, strict=True), 1)
    ]
    write_shard(folder / PROMPTS, of_prompts, Prompt)
    for mode, of_mode in answers.items():
        rows = [
            _as_sample(name, mode, number, answer)
            for name, of_one in zip(names, of_mode, strict=True)
            for number, answer in enumerate(of_one)
        ]
        write_shard(folder / SAMPLES / f"{mode}.parquet", rows, Sample)
    settings = dict(model="reasoner", samples=samples, modes=MODES, temperature=1.0, max_tokens=MAX_TOKENS, seed=seed)
    (folder / SETTINGS).write_text(json.dumps(settings))


def load_policy(model: Path, adapter: Path | None) -> Reasoner:
    """The reasoner with an adapter merged into it, float32."""
    reasoner = load_reasoner(model)
    if adapter is None:
        return reasoner
    from peft import PeftModel

    merged = PeftModel.from_pretrained(reasoner.model, adapter).merge_and_unload()
    return Reasoner(merged.eval(), reasoner.tokenizer)


def _as_sample(name: str, mode: str, number: int, answer: Answer) -> Sample:
    return Sample(
        prompt_id=name,
        mode=mode,
        number=number,
        text=answer.text.removesuffix(END),
        tokens=len(answer.ids),
        finish_reason="stop" if answer.ended else "length",
        logprob_sum=sum(answer.log_probs),
        marks=() if answer.ended else (TRUNCATED,),
    )


def _has_both(row: dict) -> bool:
    return all(row.get(name) for name in ("rejected_response", "empty_response", "empty_rejected_response"))


def _bvpo(*words: object) -> None:
    """A command of the product; its words are shown where it fails.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bvpo", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"bvpo {words[0]} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
