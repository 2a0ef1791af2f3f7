"""report.md and its plots, from the tables alone (runs.csv, steps.csv, answers.csv and so on)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.study import plots, second_round, side_arms
from benchmarks.study.answers import all_comparisons, answers, greedy_difference
from benchmarks.study.cells import IN_MODE, compared, difference, number, percent, ratio, signed, table
from benchmarks.study.gradient_parts import (
    SETTLED,
    alpha_shifts,
    bias_means,
    changes,
    last_alphas,
    last_bands,
    moment_ratios,
    squares,
)
from benchmarks.study.intervals import crossed, over_seeds
from benchmarks.study.plan import ARMS, CHOOSING_SEED, OTHER_LAYOUT, SECOND_ROUND, Size
from benchmarks.study.results import Tables
from megatron_bvpo.rehearsal.reasoner.tokens import MODES

COMMAND = "benchmarks/study/run.sh"


def write_report(folder: Path, size: Size) -> Path:
    """Also the plots beside it."""
    tables = Tables(folder)
    batches = [batch for batch in tables.batches if batch in size.batches]
    parts = [
        "# Does it help? Results",
        f"Written by `{COMMAND}`; do not edit by hand. The prediction, made before the arms ran, is "
        "benchmarks/study/prediction.md; what follows for a user is in docs/alpha.md.",
        *answers(tables, batches),
        *set_up(tables, size),
        *accuracy(tables, batches),
        *comparisons(tables, batches),
        *noise(tables, batches),
        *alpha(tables, batches),
        *movement(tables, batches),
        *side_arms.section(tables, min(batches)),
        *bias(tables),
        *second_round.section(tables, max(batches)),
        *layout(tables),
    ]
    plots.accuracy(tables, batches, folder / "accuracy.png")
    plots.alpha(tables, batches, folder / "alpha.png")
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def set_up(tables: Tables, size: Size) -> list[str]:
    chosen = sorted(
        {(int(r["batch"]), float(r["rate"])) for arm in ARMS for b in size.batches for r in tables.of(arm, b)}
    )
    tried = [r for r in tables.runs.values() if int(r["seed"]) == CHOOSING_SEED]
    lines = [
        [r["batch"], f"{float(r['rate']):g}", percent(r["thinking_right"]), percent(r["empty_right"])]
        for r in sorted(tried, key=lambda r: (int(r["batch"]), float(r["rate"])))
    ]
    rows = [int(line["rows"]) for line in tables.pairs if int(line["seed"]) in size.of_seeds]
    return [
        "## What ran",
        "The small reasoner (three million parameters), LoRA of rank 32, β = 1, "
        f"{size.steps} steps of every run at a constant rate, {size.seeds} seeds of questions, answers and order, the "
        "same for all arms but `again-fresh`. A seed's file has "
        f"{min(rows)} to {max(rows)} rows, each with a trace pair and an empty pair. Evaluated on {size.questions:,} "
        f"held-out questions, {size.repeats} answers each at temperature 1 and mode.",
        "± is half a 95 % interval: over questions and seeds for accuracies (benchmarks/study/intervals.py), over "
        f"seeds for everything else. All cells: `{COMMAND}`; a run's flags are in runs.csv, its answers in "
        "answers.csv.",
        "The rate was chosen on trace only, by accuracy with thinking on other questions (one run each, "
        f"{size.choosing} questions, {size.repeats} answers each: at most ± {half_of_one(size)} points): "
        + ", ".join(f"{rate:g} for batches of {batch}" for batch, rate in chosen)
        + ".",
        table(["batch", "rate", "with thinking, %", "without, %"], lines),
        "What limits it: the rate was tuned on trace only; the questions that choose it are mostly sums, as the "
        "other families have few held-out ones. A row's question had right and wrong answers without thinking, for "
        f"all arms. Batches of {max(size.batches)} go through their rows "
        f"{max(size.batches) * size.steps / np.mean(rows):.1f} times, those of {min(size.batches)} "
        f"{min(size.batches) * size.steps / np.mean(rows):.1f} times, so that batch and data cannot be told apart. "
        "prediction.md counts 11 probes where there are 10, and what it expects to be able to tell (1.5 and 2 "
        "points) took no count of how few six seeds are.",
    ]


def half_of_one(size: Size) -> str:
    return f"{100 * 1.96 * (0.25 / size.choosing) ** 0.5:.1f}"


def accuracy(tables: Tables, batches: list[int]) -> list[str]:
    untrained = ("untrained", 0)
    first = ["–", "untrained", len(tables.of(*untrained))]
    for mode in MODES:
        first += [crossed(tables.answers(*untrained, mode)), "–", *greedy_cell(tables, *untrained, mode)]
    lines = [first]
    for batch in batches:
        for arm in ARMS:
            line = [batch, arm, len(tables.of(arm, batch))]
            for mode in MODES:
                line += [crossed(tables.answers(arm, batch, mode))]
                line += [signed(difference(tables, (arm, batch), untrained, mode))]
                line += greedy_cell(tables, arm, batch, mode)
            lines.append(line)
    columns = [f"{word} {IN_MODE[mode]}" for mode in MODES for word in ("right, %,", "− untrained,", "greedy, %,")]
    questions = len(tables.families)
    return [
        "## Accuracy",
        f"{questions:,} questions a cell. `half` is α = .5, DPO on both sets as one. Greedy: the likeliest tokens "
        "in place of temperature 1, which training that only sharpens would leave where it was (untrained: one "
        "run, over questions).",
        table(["batch", "arm", "runs", *columns], lines),
        "![accuracy](accuracy.png)",
        families(tables, max(batches)),
    ]


def greedy_cell(tables: Tables, arm: str, batch: int, mode: str) -> list[object]:
    """Greedy answers of one model are the same for all seeds: the untrained one has a single run, over questions."""
    there = [tables.greedy[run["name"], mode] for run in tables.of(arm, batch) if (run["name"], mode) in tables.greedy]
    if len(there) == 1:
        return [over_seeds(there[0])]
    apart = greedy_difference(tables, arm, batch, mode)
    return ["–" if apart is None else f"{100 * np.mean(there):.1f} ({signed(apart)})"]


def families(tables: Tables, batch: int) -> str:
    """With thinking, by family: less the untrained model."""
    names, lines = list(dict.fromkeys(tables.families)), []
    of = np.array(tables.families)
    for arm in ARMS:
        apart = tables.differences((arm, batch), ("untrained", 0), "thinking")
        lines.append([arm, len(apart), *(signed(crossed(apart[:, of == name])) for name in names)])
    header = [f"{name.replace('_', ' ')} ({(of == name).sum()} questions)" for name in names]
    return f"With thinking, by family, batches of {batch}, less the untrained model:\n\n" + table(
        ["arm", "runs", *header], lines
    )


def comparisons(tables: Tables, batches: list[int]) -> list[str]:
    cells, found = all_comparisons(tables, batches)
    return [
        "## Arm against arm",
        "Differences in points, paired by seed and question. `for all`: half the interval that holds for all "
        f"{len(cells)} at once (Bonferroni); p is corrected for all (Holm). The last column is the difference that "
        "these runs and questions tell with a chance of 80 % among them all (noncentral t). Where trace only "
        "itself cannot be told from the untrained model, a difference that is not told says little of either arm.",
        compared([(f"batch {batch}, {IN_MODE[mode]}", a, b) for batch, mode, a, b in cells], found),
    ]


def noise(tables: Tables, batches: list[int]) -> list[str]:
    """The paper's claim of stability, from probes and from steps."""
    lines = []
    for batch in batches:
        ratios = [moment_ratios(tables.steps[line["name"]]) for line in tables.of("auto", batch)]
        cells = [over_seeds(np.array([r[name] for r in ratios])) for name in ("empty", "half", "chosen", "bias")]
        lines.append([batch, len(ratios), *map(number, cells)])
    steps = []
    for batch in batches:
        trace = [changes(tables.steps[line["name"]]) for line in tables.of("trace", batch)]
        for arm in ARMS:
            mine = [changes(tables.steps[line["name"]]) for line in tables.of(arm, batch)]
            line = [batch, arm, len(mine)]
            for name in ("gradient", "margin"):
                logs = [np.log(m[name] / t[name]) for m, t in zip(mine, trace, strict=True) if name in m and name in t]
                line.append(ratio(over_seeds(np.array(logs))) if len(logs) > 1 and arm != "trace" else "–")
            line.append(number(over_seeds(np.array([m["share"] for m in mine]))))
            steps.append(line)
    return [
        "## Does variance fall as the paper says?",
        "From the probes of `auto`, at the same parameters and pairs: variance of the batch's gradient in parts of "
        "the trace gradient's (sums over a run's probes, most of which are its first steps), and the squared "
        "distance of the two means, D − W.",
        table(["batch", "runs", "empty", "α = .5", "the run's α", "distance of the means"], lines),
        f"From step to step, behind step {SETTLED}: ½‖g − g′‖² with the step before, and the same of the trace "
        "pairs' margin (rewards), in parts of trace only's of the same seed (geometric means over seeds). An empty "
        "answer has three tokens, so that its gradient is small altogether; what Adam feels is the last column, "
        "the sum of ½‖g − g′‖² in parts of the sum of ‖g‖²: 1 is noise alone.",
        table(["batch", "arm", "runs", "gradient", "margin of the trace pairs", "noise in ‖g‖²"], steps),
    ]


def alpha(tables: Tables, batches: list[int]) -> list[str]:
    lines = []
    for batch in batches:
        paths = [tables.steps[line["name"]] for line in tables.of("auto", batch)]
        mean = np.array([np.mean([float(line["alpha"]) for line in path]) for path in paths])
        found = (last_alphas(tables, batch), mean, *last_bands(tables, batch))
        probes = sum(bool(line.get("D")) for line in paths[0])
        lines.append([batch, len(paths), probes, *(number(over_seeds(values)) for values in found)])
    return [
        "## α and its band",
        "The band is the estimator's at its last probe.",
        table(["batch", "runs", "probes a run", "α of the last step", "mean α of all steps", "band from", "to"], lines),
        "![α over the steps](alpha.png)",
    ]


def movement(tables: Tables, batches: list[int]) -> list[str]:
    untrained = [run for run in tables.of("untrained", 0) if (run["name"], "empty") in tables.sides]
    if not untrained:
        return []
    start = {mode: tables.sides[untrained[0]["name"], mode] for mode in MODES}
    rest = tables.of("untrained", 0)
    lengths = [number(over_seeds(np.array([float(run[f"{m}_tokens"]) for run in rest]))) for m in MODES]
    lines = [["–", "untrained", len(rest), "0", "0", "0", "0", *lengths, "0"]]
    for batch in batches:
        for arm in (*ARMS, *SECOND_ROUND):
            runs = [run for run in tables.of(arm, batch) if (run["name"], "empty") in tables.sides]
            if len(runs) < 2:
                continue
            line = [batch, arm, len(runs)]
            for mode in MODES:
                for side in ("chosen", "rejected"):
                    now = [float(tables.sides[run["name"], mode][side]) for run in runs]
                    line.append(number(over_seeds(np.array(now) - float(start[mode][side]))))
            line += [number(over_seeds(np.array([float(run[f"{mode}_tokens"]) for run in runs]))) for mode in MODES]
            lines.append([*line, f"{tokens(tables, arm, batch, int(runs[0]['steps'])):,.0f}"])
    return [
        "## How far it moves",
        "Log-probability of held-out pairs' sides less the untrained model's, nats a response, "
        f"{start['empty']['pairs']} pairs of questions that no run has had (intervals over seeds, for these pairs); "
        "tokens of an answer; tokens that a run learns from, mean of the seeds.",
        table(
            ["batch", "arm", "runs", "chosen, thinking", "rejected, thinking", "chosen, empty", "rejected, empty"]
            + ["tokens, thinking", "tokens, empty", "tokens learnt from"],
            lines,
        ),
    ]


def tokens(tables: Tables, arm: str, batch: int, steps: int) -> float:
    """Of prompts and responses, a run."""
    used = {"trace": ("trace",), "empty": ("empty",)}.get(arm, ("trace", "empty"))
    mine = [tables.pairs_of(run) for run in tables.of(arm, batch)]
    return steps * batch * float(np.mean([sum(float(line[f"{name}_tokens"]) for name in used) for line in mine]))


def bias(tables: Tables) -> list[str]:
    if len(tables.bias) < 2:
        return []
    means = bias_means(tables)
    rows = [[name, len(means), number(estimate)] for name, estimate in squares(means).items()]
    shifts = alpha_shifts(means)
    rows += [[f"true α − α, κ = {kappa:g}, batches of 8", len(means), found] for kappa, found in shifts.items()]
    return [
        "## Is b_t = 0 harmless after a round?",
        f"At the adapters of {tables.bias[0]['run']}: b_t is the trace gradient on the untrained model's pairs less "
        "that on the trained policy's fresh ones, b_e the same of the empty gradient, on the same questions, which "
        f"no run has had (benchmarks/study/bias.py). {means[0]['stale']:.0f} questions have pairs of the untrained "
        f"model, {np.mean([m['fresh'] for m in means]):.0f} of the trained one on average; those of both count, "
        f"{np.mean([m['pairs'] for m in means]):.0f} a fold. Student's intervals over seeds, for these questions. "
        "This is what going stale does, and not what Jensen's inequality adds. How far α would move is said where "
        "‖b_e − b_t‖² is told from 0: below that the estimate is noise divided by noise.",
        table(["what", "runs", "found"], rows),
    ]


def layout(tables: Tables) -> list[str]:
    found = [name for name in tables.runs if name.endswith(OTHER_LAYOUT)]
    lines = []
    for name in found:
        one = name.removesuffix(OTHER_LAYOUT)
        pairs = list(zip(tables.steps[one], tables.steps[name], strict=True))
        lines.append(
            [
                one,
                *(f"{max(abs(float(a[k]) - float(b[k])) for a, b in pairs):.1e}" for k in ("loss", "alpha")),
                *(
                    f"{(tables.right[one, mode] == tables.right[name, mode]).mean():.3f}"
                    f" of {len(tables.right[one, mode])}"
                    for mode in MODES
                ),
                *(f"{100 * (tables.right[name, mode].mean() - tables.right[one, mode].mean()):+.2f}" for mode in MODES),
            ]
        )
    return [
        "## One rank and TP2 · PP2",
        "The same run on four ranks: largest differences over all steps, and of the answers (same seeds).",
        table(
            ["run", "loss", "α", "questions alike, thinking", "empty", "accuracy apart, thinking", "empty"],
            lines,
        ),
    ]
