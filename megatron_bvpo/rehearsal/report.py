"""What a run learnt, for a person: short lines while it runs, a table and a plot at its end.

`python -m megatron_bvpo.rehearsal.report RUN_FOLDER` reads `logging.jsonl` of any BVPO run and writes
`bvpo.png` beside it. `--follow` turns the full log on standard input into a line a step.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path

STREAMS = (("trace", ""), ("empty", "empty/"))
_METRICS = re.compile(r"\{'(?:eval_)?loss'.*\}")
_TOLD = re.compile(
    r"(data: |The empty trace|is whole: |\[(?:empty_)?(?:chosen|rejected)\] |Step \d+ skipped|error)", re.I
)


def read_log(run: Path) -> tuple[list[dict], list[dict]]:
    """Training and evaluation lines of a run, each with its step number under `step`."""
    training, evaluation = [], []
    for text in (run / "logging.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "iteration" not in line:
            continue
        line["step"] = int(line["iteration"].split("/")[0])
        (evaluation if "eval_loss" in line else training).append(line)
    return training, evaluation


def follow(stream) -> None:
    """Print what a person wants to see of a training log."""
    for line in stream:
        if found := _METRICS.search(line):
            print(step_line(ast.literal_eval(found.group(0))), flush=True)
        elif _TOLD.search(line) and "args: " not in line:
            print(line.split("] ", 1)[-1].rstrip()[:220] if line.startswith("[INFO") else line.rstrip(), flush=True)


def step_line(metrics: dict) -> str:
    held_out = "eval_loss" in metrics
    prefix = "eval_" if held_out else ""
    parts = [f"{'held-out' if held_out else 'step':8s} {metrics['iteration']:>8s}  loss {metrics[prefix + 'loss']:.4f}"]
    for name, stream in STREAMS:
        if f"{prefix}loss/{name}" in metrics:
            parts.append(
                f"{name}: loss {metrics[f'{prefix}loss/{name}']:.4f} "
                f"accuracy {metrics[f'{prefix}{stream}rewards/accuracies']:.2f} "
                f"margin {metrics[f'{prefix}{stream}rewards/margins']:+.3f}"
            )
    if not held_out:
        parts.append(f"grad norm {metrics['grad_norm']:.2f}")
    return "   ".join(parts)


def table(evaluation: list[dict]) -> str:
    """First and last evaluation on the held-out pairs, as Markdown."""
    first, last = evaluation[0], evaluation[-1]
    rows = [f"| held-out | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    for name, stream in STREAMS:
        if f"eval_loss/{name}" not in last:
            continue
        for what, key in (
            ("loss", f"eval_loss/{name}"),
            ("rewards/accuracies", f"eval_{stream}rewards/accuracies"),
            ("rewards/margins", f"eval_{stream}rewards/margins"),
        ):
            rows.append(f"| {name} {what} | {first[key]:.3f} | {last[key]:.3f} |")
    return "\n".join(rows)


def plot(training: list[dict], evaluation: list[dict], target: Path) -> None:
    """Losses and margins of both streams over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, margins) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for (name, stream), colour in zip(STREAMS, ("tab:blue", "tab:orange"), strict=True):
        for axes, key in ((losses, f"loss/{name}"), (margins, f"{stream}rewards/margins")):
            points = [(line["step"], line[key]) for line in training if key in line]
            held_out = [(line["step"], line[f"eval_{key}"]) for line in evaluation if f"eval_{key}" in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.45, label=f"{name}, training")
            if held_out:
                axes.plot(*zip(*held_out, strict=True), "o-", color=colour, markersize=4, label=f"{name}, held out")
    for axes, title in ((losses, "Loss of each stream"), (margins, "Reward margin, chosen − rejected")):
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--follow", action="store_true", help="shorten a log on standard input")
    arguments = parser.parse_args()
    if arguments.follow:
        follow(sys.stdin)
        return
    training, evaluation = read_log(arguments.run)
    target = arguments.run / "bvpo.png"
    plot(training, evaluation, target)
    if evaluation:
        print("\n" + table(evaluation))
    print(f"\nPlot: {target}\nLog:  {arguments.run / 'logging.jsonl'}")


if __name__ == "__main__":
    main()
