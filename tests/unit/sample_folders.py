"""Folders of samples as `bvpo sample` and `bvpo judge` leave them, for the tests of `bvpo pairs`."""

import json
import random
from pathlib import Path

from megatron_bvpo.sampling.samples import (
    JUDGEMENTS,
    PROMPTS,
    SAMPLES,
    SETTINGS,
    THINKS,
    TRUNCATED,
    Judgement,
    Prompt,
    Sample,
    write_shard,
)


def write_folder(folder: Path, prompts, samples, judgements, *, judge="math", settings=None) -> Path:
    """A folder of samples with one shard of each; judge None leaves it unjudged."""
    write_shard(folder / PROMPTS, prompts, Prompt)
    write_shard(folder / SAMPLES / "000.parquet", samples, Sample)
    if judge is not None:
        write_shard(folder / JUDGEMENTS / judge / "000.parquet", judgements, Judgement)
    (folder / SETTINGS).write_text(json.dumps(settings or {"model": "tiny", "temperature": 0.8}))
    return folder


def ask(prompt_id: str, text: str | None = None, answer: str | None = "4", **columns) -> Prompt:
    content = text or f"What is two and two, asked for the time {prompt_id}?"
    return Prompt(prompt_id, [{"role": "user", "content": content}], answer, f"p.jsonl:{prompt_id}", columns)


def answered(prompt_id: str, number: int, right: bool, *, mode="thinking", words="Two and two.", **more):
    """(a sample, what a judge says of it)."""
    answer = f"It is {4 if right else 5}{'.' * number}"
    text = answer if mode == "empty" else f"<think>\n{words} {'Hm. ' * number}\n</think>\n\n{answer}"
    parsed = more.pop("parsed", "4" if right else "5")
    judged = Judgement(prompt_id, mode, number, float(right), right, parsed)
    return Sample(prompt_id, mode, number, **{"text": text, "tokens": len(text) // 3, **more}), judged


def synthetic(folder: Path, prompts: int, *, samples: int = 4, seed: int = 0, longer_right: bool = False) -> Path:
    """Prompts of all sorts: always right, always wrong, mixed, cut off, thinking in empty mode."""
    draw = random.Random(seed)
    asked, found, said = [], [], []
    for i in range(prompts):
        name = f"q{i}"
        asked.append(ask(name, f"What is {i} and {i + 1} and {seed}?", str(2 * i + 1)))
        for mode in ("thinking", "empty"):
            rate = draw.betavariate(0.8, 0.8) * (1 if mode == "thinking" else 0.6)
            for number in range(samples):
                right = draw.random() < rate
                result = 2 * i + 1 if right else 2 * i + 2 + draw.randrange(5)
                trace = "So " + "I count on " * draw.randrange(1, 9) + "more " * (8 if longer_right and right else 0)
                answer = f"The result is {result}{', I think' * draw.randrange(3)}."
                text = answer if mode == "empty" else f"<think>\n{trace}\n</think>\n\n{answer}"
                marks, finish = (), "stop"
                if mode == "thinking" and draw.random() < 0.05:
                    text, marks, finish = f"<think>\n{trace}", (TRUNCATED,), "length"
                if mode == "empty" and draw.random() < 0.05:
                    text, marks = f"Well.\n</think>\n\n{answer}", (THINKS,)
                tokens = len(text) // 4 + 1
                found.append(
                    Sample(
                        name, mode, number, text, tokens, 9, finish, -draw.random() * tokens, 0.1, 1, "s", 0.1, marks
                    )
                )
                parsed = None if finish == "length" or draw.random() < 0.05 else str(result)
                said.append(Judgement(name, mode, number, float(right), right, parsed))
    return write_folder(folder, asked, found, said)
