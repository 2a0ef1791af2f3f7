"""Folders of runs as ms-swift and our trainer leave them, made up: for tests of `bvpo report`."""

import json
import math
import random
from pathlib import Path

from megatron_bvpo.evaluation.scores_file import Missing, Score, Scores, write


def made_run(
    folder: Path,
    *,
    steps: int = 60,
    seed: int = 0,
    speed: float = 0.05,
    spikes: tuple[int, ...] = (),
    streams: tuple[str, ...] = ("trace", "empty"),
    settings: dict | None = None,
    versions: dict | None = None,
) -> Path:
    """A run whose losses fall at `speed`, with a gradient norm ten times its neighbours' at `spikes`."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        if step % 10 == 0:
            lines.append(metrics(rng, step, steps, speed, streams, "eval_", noise=0.1))
        if step < steps:
            line = metrics(rng, step + 1, steps, speed, streams, "", noise=1.0)
            line["grad_norm"] = 1.2 * math.exp(rng.gauss(0, 0.2)) * (10 if step + 1 in spikes else 1)
            if len(streams) == 2:
                centre = 0.5 + 0.4 * (1 - math.exp(-step / 20))
                line["alpha"] = round(centre, 4)
                if step < 8 or step % 10 == 0:
                    wide = 0.5 * math.exp(-step / 30)
                    line |= {"moments/D": 4.0, "moments/X": 2.0, "moments/W": 3.0, "alpha/stderr": wide / 2}
                    line |= {"alpha/low": max(0, centre - wide), "alpha/high": min(1, centre + wide)}
            lines.append(line)
    lines.append({"last_model_checkpoint": str(folder / f"checkpoint-{steps}"), "best_metric": None})
    (folder / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {
        "model": "Qwen/Qwen3-30B-A3B-Thinking-2507",
        "tuner_type": "lora",
        "dataset": ["data/pairs.jsonl"],
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lr": 5e-5,
        "beta": 0.1,
        "target_modules": ["all-linear"],
        "bvpo_alpha": "auto",
        "output_dir": str(folder),
        "hub_token": None,
        "swift_version": "4.6.0",
    }
    (folder / "args.json").write_text(json.dumps(flags | (settings or {})))
    if versions:
        (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def metrics(rng, step: int, steps: int, speed: float, streams, prefix: str, noise: float) -> dict:
    """A line of the log, training or (`prefix` eval_) held out; with one stream as ms-swift's DPO writes it."""
    line = {"iteration": f"{step}/{steps}", f"{prefix}loss": 0.0}
    for name in streams:
        at = "" if name == "trace" else "empty/"
        scale = 1.0 if name == "trace" else 0.5
        margin = scale * (1 - math.exp(-speed * step)) * 1.5 + noise * rng.gauss(0, 0.08) * (step > 0)
        chosen = 0.3 * margin + noise * rng.gauss(0, 0.02) * (step > 0)
        loss = math.log1p(math.exp(-margin))
        line[f"{prefix}loss"] += loss / len(streams)
        if len(streams) == 2:
            line[f"{prefix}loss/{name}"] = loss
        accuracy = 0.5 + 0.45 * math.tanh(margin) + noise * rng.gauss(0, 0.04)
        line |= {
            f"{prefix}{at}rewards/chosen": chosen,
            f"{prefix}{at}rewards/rejected": chosen - margin,
            f"{prefix}{at}rewards/margins": margin,
            f"{prefix}{at}rewards/accuracies": min(1.0, max(0.0, accuracy)),
        }
    return line


def made_scores(folder: Path, shares: dict[tuple[str, str], float], questions: int = 400, missing=()) -> Path:
    """An evaluation as `bvpo eval` writes it. shares: (title, mode) → share of questions, from the first on, right."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = []
    for (title, mode), share in shares.items():
        by_question = {f"{i:016x}": [float(i < round(share * questions))] for i in range(questions)}
        more = {"dataset": title.lower(), "title": title, "mode": mode, "metric": "acc", "repeats": 1, "thinks": None}
        scores.append(Score.of(by_question, **more, tokens=5120.3, cut_off=0.012, unparsed=0.004, failed=0))
    return write(folder, Scores("m", "hard", {}, scores, [Missing(*row) for row in missing]))
