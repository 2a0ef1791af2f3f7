"""What a run learnt, for a person: short lines while it runs, a table and a plot at its end.

`bvpo report RUN [RUN …]` reads `logging.jsonl` of each BVPO run and writes `bvpo.png` beside it; with `--html FILE` all
of them become one page, too, on which models can stand that were evaluated and not trained: RUN is then the folder that
holds the evaluation's. With `--follow` it turns the full log on standard input into a line a step.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

from megatron_bvpo.errors import UserError
from megatron_bvpo.reporting.run_files import read_runs, require_run
from megatron_bvpo.reporting.run_log import LOG, STREAMS, measured_streams, read_log
from megatron_bvpo.streams import TABLE

_METRICS = re.compile(r"\{'(?:eval_)?loss'.*\}")
_TOLD = re.compile(
    r"(data: |The empty trace|is whole: |(?:α|the weights) (?:settled|stayed)"
    r"|\[(?:[a-z]+_)?(?:chosen|rejected|response)\] |Step \d+ skipped|error)",
    re.I,
)


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
    if "expert" in measured_streams(metrics, prefix):
        parts.append(
            f"expert: loss {metrics[f'{prefix}loss/expert']:.4f} nll {metrics[f'{prefix}expert/nll_loss']:.3f}"
        )
    if not held_out:
        parts.append(f"grad norm {metrics['grad_norm']:.2f}")
        if "alpha/stderr" in metrics:
            parts.append(f"α {metrics['alpha']:.2f} (measuring)")
        elif any(f"weight/{name}" in metrics for name in TABLE):
            parts.append("weights " + " ".join(f"{n} {metrics[f'weight/{n}']:.2f}" for n in measured_streams(metrics)))
    return "   ".join(parts)


def table(evaluation: list[dict]) -> str:
    """First and last evaluation on the held-out pairs, as Markdown; empty without any."""
    if not evaluation:
        return ""
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
            if key in first and key in last:
                rows.append(f"| {name} {what} | {first[key]:.3f} | {last[key]:.3f} |")
    if "eval_loss/expert" in last:
        for what, key in (("loss", "eval_loss/expert"), ("nll_loss", "eval_expert/nll_loss")):
            rows.append(f"| expert {what} | {first[key]:.3f} | {last[key]:.3f} |")
    return "\n".join(rows)


def plot(training: list[dict], evaluation: list[dict], target: Path) -> None:
    """Losses and margins of the streams over the steps; where alpha was estimated, how."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    probes = [line for line in training if "moments/D" in line]
    rows = 2 if probes else 1
    figure, grid = plt.subplots(rows, 2, figsize=(11, 4 * rows), constrained_layout=True, squeeze=False)
    losses, margins = grid[0]
    for stream, colour in zip(TABLE.values(), ("tab:blue", "tab:orange", "tab:olive", "tab:gray"), strict=True):
        name = stream.name
        for axes, key in ((losses, f"loss/{name}"), (margins, f"{stream.log_prefix}rewards/margins")):
            points = [(line["step"], line[key]) for line in training if key in line]
            held_out = [(line["step"], line[f"eval_{key}"]) for line in evaluation if f"eval_{key}" in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.45, label=f"{name}, training")
            if held_out:
                axes.plot(*zip(*held_out, strict=True), "o-", color=colour, markersize=4, label=f"{name}, held out")
    losses.set_title("Loss of each stream")
    margins.set_title("Reward margin, chosen − rejected")
    if probes:
        _plot_alpha(grid[1][0], training, probes)
        _plot_moments(grid[1][1], probes)
    for axes in grid.flat:
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _plot_alpha(axes, training: list[dict], probes: list[dict]) -> None:
    """alpha as it was used, and the band around what was known at the probes."""
    axes.plot(
        [line["step"] for line in training], [line["alpha"] for line in training], color="tab:green", label="α used"
    )
    steps = [line["step"] for line in probes]
    low, high = ([line[f"alpha/{end}"] for line in probes] for end in ("low", "high"))
    axes.fill_between(steps, low, high, color="tab:green", alpha=0.15, label="band of 95 %")
    axes.plot(steps, [line["alpha"] for line in probes], "|", color="black", label="a probe")
    axes.set(title="α, the weight of the trace gradient", ylim=(-0.02, 1.02))


def _plot_moments(axes, probes: list[dict]) -> None:
    """D, X and W of each probe, in squared gradient units."""
    for name, colour in (("D", "tab:red"), ("X", "tab:purple"), ("W", "tab:brown")):
        axes.plot([p["step"] for p in probes], [p[f"moments/{name}"] for p in probes], ".-", color=colour, label=name)
    axes.set_title("Moments: D = |g_t − g_e|², X = V_t − C, W = V_t + V_e − 2C")


def write_report(run: Path, target: Path) -> str:
    """Plot a run into `target`; returns the table of its evaluations (empty without any), or that nothing is logged."""
    training, evaluation = read_log(run)
    if not training and not evaluation:
        return "No step is logged."
    plot(training, evaluation, target)
    return table(evaluation)


def add_command(subparsers) -> None:
    """`bvpo report`."""
    parser = subparsers.add_parser("report", help="table, plot and page of one run or several", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folder of a run (its --output_dir)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page of all runs, which needs no network")
    parser.add_argument("--follow", action="store_true", help="shorten a log on standard input")
    parser.set_defaults(run=report)


def report(arguments: argparse.Namespace) -> int:
    if arguments.follow:
        follow(sys.stdin)
        return 0
    if not arguments.runs:
        raise UserError("a run is needed", field="RUN", remedy="name the run's --output_dir: bvpo report output/run-70")
    runs = [require_run(run) for run in arguments.runs]
    if arguments.html is not None:
        from megatron_bvpo.reporting.html_page import require_page, write_page

        require_page(arguments.html)
    for run in dict.fromkeys(runs):
        if not (run / LOG).is_file():
            print(f"\n{run} was evaluated, and not trained: its scores are on the page (--html).")
            continue
        target = run / "bvpo.png"
        try:
            told = write_report(run, target)
            plot_at = target if target.exists() else "none"
        except ImportError:
            told, plot_at = "", "none: matplotlib is missing (pip install 'megatron-bvpo[rehearsal]')"
        except OSError as e:  # somebody else's run
            told, plot_at = table(read_log(run)[1]), f"none: {target} cannot be written ({e.strerror or e})"
        print(f"\n{told}\n\nPlot: {plot_at}\nLog:  {run / LOG}")
    if arguments.html is not None:
        write_page(read_runs(runs), arguments.html)
        print(f"Page: {arguments.html}")
    return 0
