"""report.md and its plots, from the tables alone (runs.csv, steps.csv, answers.csv, pairs.csv, bias.csv)."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.study import plots
from benchmarks.study.intervals import Estimate, crossed, detectable, over_seeds
from benchmarks.study.pairs import MODES
from benchmarks.study.plan import ARMS, CHOOSING_SEED, MORE_ARMS, Size
from megatron_bvpo.evaluation.paired_differences import LEVEL, holm

COMMAND = "benchmarks/study/run.sh"
IN_MODE = {"thinking": "with thinking", "empty": "without"}
COMPARED = (("auto", "half"), ("auto", "trace"), ("half", "trace"), ("empty", "trace"))
Rows = list[dict[str, str]]


class Tables:
    """The tables of a folder.

    Attributes:
        runs: name → line of runs.csv. right: (name, mode) → [questions] share of the answers that are right.
        steps: name → lines of steps.csv.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = {line["name"]: line for line in read(folder / "runs.csv")}
        self.right = {
            (line["name"], line["mode"]): np.array([int(digit) for digit in line["right"]]) / int(line["repeats"])
            for line in read(folder / "answers.csv")
        }
        self.steps: dict[str, Rows] = defaultdict(list)
        for line in read(folder / "steps.csv"):
            self.steps[line["name"]].append(line)
        self.bias = read(folder / "bias.csv") if (folder / "bias.csv").exists() else []
        self.pairs = read(folder / "pairs.csv")

    def of(self, arm: str, batch: int) -> Rows:
        """An arm's runs in the order of their seeds; those that chose the rate and the other layout's are left out."""
        found = [
            line
            for line in self.runs.values()
            if (line["arm"], int(line["batch"])) == (arm, batch)
            and int(line["seed"]) != CHOOSING_SEED
            and not line["name"].endswith("tp2pp2")
        ]
        return sorted(found, key=lambda line: int(line["seed"]))

    def answers(self, arm: str, batch: int, mode: str) -> np.ndarray:
        """[seeds, questions]"""
        return np.array([self.right[line["name"], mode] for line in self.of(arm, batch)])

    @property
    def batches(self) -> list[int]:
        return sorted(
            {int(line["batch"]) for line in self.runs.values() if line["arm"] in ARMS and "tp2" not in line["name"]}
        )


def read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_report(folder: Path, size: Size) -> Path:
    """Also the plots beside it."""
    tables = Tables(folder)
    batches = [batch for batch in tables.batches if batch in size.batches]
    parts = [
        "# Does it help? Results",
        f"Written by `{COMMAND}`; do not edit by hand. The prediction, made before the arms ran, is "
        "benchmarks/study/prediction.md; what follows for a user is in docs/alpha.md.",
        *set_up(tables, size),
        *accuracy(tables, batches),
        *comparisons(tables, batches),
        *noise(tables, batches),
        *alpha(tables, batches),
        *movement(tables, batches),
        *more(tables, min(batches)),
        *bias(tables),
        *layout(tables),
    ]
    plots.accuracy(tables, batches, folder / "accuracy.png")
    plots.alpha(tables, batches, folder / "alpha.png")
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


# ---- parts


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
        f"The small reasoner (three million parameters), LoRA of rank 32, β = 1, {size.steps} steps of every run at a constant "
        f"rate, {size.seeds} seeds of questions, answers and order, the same for all arms. A seed's file has "
        f"{min(rows)} to {max(rows)} rows, each with a trace pair and an empty pair. Evaluated on {size.questions:,} "
        f"held-out questions, {size.repeats} answers each at temperature 1 and mode.",
        "± is half a 95 % interval: over questions and seeds for accuracies (benchmarks/study/intervals.py), over seeds "
        f"for everything else. All cells: `{COMMAND}`; a run's flags are in runs.csv, its answers in answers.csv.",
        "The rate was chosen on trace only, by accuracy with thinking on other questions (one run each, "
        f"{size.choosing} questions, {size.repeats} answers each: ± {half_of_one(size)} points): "
        + ", ".join(f"{rate:g} for batches of {batch}" for batch, rate in chosen)
        + ".",
        table(["batch", "rate", "with thinking, %", "without, %"], lines),
    ]


def half_of_one(size: Size) -> str:
    return f"{100 * 1.96 * (0.25 / size.choosing) ** 0.5:.1f}"


def accuracy(tables: Tables, batches: list[int]) -> list[str]:
    untrained = {mode: tables.answers("untrained", 0, mode) for mode in MODES}
    lines = []
    for batch in batches:
        for arm in ARMS:
            line = [batch, arm, len(tables.of(arm, batch))]
            for mode in MODES:
                found = tables.answers(arm, batch, mode)
                line += [crossed(found), signed(crossed(found - untrained[mode]))]
            lines.append(line)
    first = ["–", "untrained", len(tables.of("untrained", 0))]
    for mode in MODES:
        first += [crossed(untrained[mode]), "–"]
    header = [
        "batch",
        "arm",
        "runs",
        *(word for mode in MODES for word in (f"right {IN_MODE[mode]}, %", "− untrained")),
    ]
    n, questions = untrained["thinking"].shape
    return [
        "## Accuracy",
        f"{questions:,} questions a cell. `half` is α = .5, DPO on both sets as one.",
        table(header, [first, *lines]),
        "![accuracy](accuracy.png)",
    ]


def difference(tables: Tables, a: tuple[str, int], b: tuple[str, int], mode: str) -> Estimate:
    """a − b, seed by seed and question by question."""
    return crossed(tables.answers(*a, mode) - tables.answers(*b, mode))


def comparisons(tables: Tables, batches: list[int]) -> list[str]:
    cells = [(batch, mode, a, b) for batch in batches for mode in MODES for a, b in COMPARED]
    found = [difference(tables, (a, batch), (b, batch), mode) for batch, mode, a, b in cells]
    return [
        "## Arm against arm",
        f"Differences in points, paired by seed and question; p corrected for all {len(cells)} (Holm). The last column is "
        "the difference that this many runs and questions tell with a chance of 80 %, alone among them all.",
        compared([(f"batch {batch}, {IN_MODE[mode]}", a, b) for batch, mode, a, b in cells], found),
    ]


def compared(cells: Sequence[tuple[str, str, str]], found: Sequence[Estimate]) -> str:
    corrected = holm([estimate.p for estimate in found])
    lines = [
        [where, f"{a} − {b}", e.seeds, e.questions, signed(e), f"{p:.3f}", verdict(e, p, a, b)]
        + [f"{100 * detectable(e, len(found)):.1f}"]
        for (where, a, b), e, p in zip(cells, found, corrected, strict=True)
    ]
    return table(["where", "what", "runs each", "questions", "difference", "p", "verdict", "could tell"], lines)


def verdict(estimate: Estimate, p: float, a: str, b: str) -> str:
    if p >= LEVEL:
        return "cannot tell"
    return f"{a if estimate.mean > 0 else b} is better"


def noise(tables: Tables, batches: list[int]) -> list[str]:
    """The paper's claim of stability, from probes and from steps."""
    lines = []
    for batch in batches:
        ratios = [moment_ratios(tables.steps[line["name"]]) for line in tables.of("auto", batch)]
        cells = [over_seeds(np.array([r[name] for r in ratios])) for name in ("empty", "half", "chosen", "bias")]
        lines.append([batch, len(ratios), *(f"{e.mean:.2f} ± {e.half:.2f}" for e in cells)])
    steps = []
    for batch in batches:
        trace = [changes(tables.steps[line["name"]]) for line in tables.of("trace", batch)]
        for arm in ARMS:
            mine = [changes(tables.steps[line["name"]]) for line in tables.of(arm, batch)]
            cells = []
            for name in ("gradient", "margin"):
                logs = [np.log(m[name] / t[name]) for m, t in zip(mine, trace, strict=True) if name in m and name in t]
                cells.append(ratio(over_seeds(np.array(logs))) if len(logs) > 1 and arm != "trace" else "–")
            steps.append([batch, arm, len(mine), *cells])
    return [
        "## Does variance fall as the paper says?",
        "From the probes of `auto`, at the same parameters and pairs: variance of the batch's gradient in parts of the trace "
        "gradient's (sums over a run's probes), and the squared distance of the two means, D − W.",
        table(["batch", "runs", "empty", "α = .5", "the run's α", "distance of the means"], lines),
        "From step to step: ½‖g − g′‖² with the step before, and the same of the trace pairs' margin (rewards), in parts of "
        "trace only's of the same seed (geometric means over seeds). This counts the scale of the gradient, too: an arm "
        "whose loss falls has smaller ones.",
        table(["batch", "arm", "runs", "gradient", "margin of the trace pairs"], steps),
    ]


def moment_ratios(steps: Rows) -> dict[str, float]:
    probes = [{k: float(line[k]) for k in ("D", "X", "W", "V_t", "alpha")} for line in steps if line.get("D")]
    v_t = np.array([p["V_t"] for p in probes])
    x, w, d = (np.array([p[name] for p in probes]) for name in ("X", "W", "D"))
    v_e, c = w + v_t - 2 * x, v_t - x
    a = np.array([p["alpha"] for p in probes])

    def mixed(a):
        return (a**2 * v_t + (1 - a) ** 2 * v_e + 2 * a * (1 - a) * c).sum() / v_t.sum()

    return {
        "empty": mixed(0 * a),
        "half": mixed(0 * a + 0.5),
        "chosen": mixed(a),
        "bias": (d - w).sum() / v_t.sum(),
    }


def changes(steps: Rows) -> dict[str, float]:
    found = {}
    apart = [float(line["apart"]) for line in steps if line.get("apart")]
    if apart:
        found["gradient"] = sum(apart) / 2 / len(apart)
    margins = np.array([float(line["trace_margin"]) for line in steps if line.get("trace_margin")])
    if len(margins) > 1:
        found["margin"] = float((np.diff(margins) ** 2).mean() / 2)
    return found


def alpha(tables: Tables, batches: list[int]) -> list[str]:
    lines = []
    for batch in batches:
        paths = [tables.steps[line["name"]] for line in tables.of("auto", batch)]
        last = over_seeds(np.array([float(path[-1]["alpha"]) for path in paths]))
        bands = [[float(line[end]) for line in path if line.get(end)][-1] for path in paths for end in ("low", "high")]
        probes = [sum(bool(line.get("D")) for line in path) for path in paths]
        low, high = np.mean(bands[::2]), np.mean(bands[1::2])
        lines.append([batch, len(paths), probes[0], f"{last.mean:.2f} ± {last.half:.2f}", f"{low:.2f} to {high:.2f}"])
    return [
        "## α and its band",
        table(
            ["batch", "runs", "probes a run", "α of the last step", "band at the last probe, mean of its ends"], lines
        ),
        "![α over the steps](alpha.png)",
    ]


def movement(tables: Tables, batches: list[int]) -> list[str]:
    untrained = tables.of("untrained", 0)[0]
    lines = []
    for batch in batches:
        for arm in ARMS:
            runs = tables.of(arm, batch)
            moved = [
                number(over_seeds(np.array([float(r[key]) - float(untrained[key]) for r in runs])))
                for key in ("thinking_chosen", "thinking_rejected", "empty_chosen", "empty_rejected")
            ]
            lengths = [
                number(over_seeds(np.array([float(r[key]) for r in runs])))
                for key in ("thinking_tokens", "empty_tokens")
            ]
            lines.append(
                [batch, arm, len(runs), *moved, *lengths, f"{tokens(tables, arm, batch, int(runs[0]['steps'])):,.0f}"]
            )
    return [
        "## How far it moves",
        "Log-probability of held-out pairs' sides less the untrained model's, nats a response; tokens of an answer (untrained: "
        f"{float(untrained['thinking_tokens']):.1f} and {float(untrained['empty_tokens']):.1f}); tokens that a run learns from, "
        "mean of the seeds.",
        table(
            ["batch", "arm", "runs", "chosen, thinking", "rejected, thinking", "chosen, empty", "rejected, empty"]
            + ["tokens, thinking", "tokens, empty", "tokens learnt from"],
            lines,
        ),
    ]


def tokens(tables: Tables, arm: str, batch: int, steps: int) -> float:
    """Of prompts and responses, a run."""
    used = {"trace": ("trace",), "empty": ("empty",)}.get(arm, ("trace", "empty"))
    mine = [line for line in tables.pairs if line["seed"] in {r["seed"] for r in tables.of(arm, batch)}]
    return steps * batch * float(np.mean([sum(float(line[f"{name}_tokens"]) for name in used) for line in mine]))


def more(tables: Tables, batch: int) -> list[str]:
    """The arms beside, at the smallest batch."""
    there = [arm for arm in MORE_ARMS if tables.of(arm, batch_of(arm, batch))]
    if not there:
        return []
    cells = [(mode, arm, b) for mode in MODES for arm in there for b in ("auto", "trace")]
    found = [difference(tables, (arm, batch_of(arm, batch)), (b, batch), mode) for mode, arm, b in cells]
    last = []
    for arm in there:
        runs = tables.of(arm, batch_of(arm, batch))
        path = [tables.steps[run["name"]][-1].get("alpha") for run in runs]
        where = over_seeds(np.array([float(a) for a in path])) if all(path) else None
        last.append([arm, len(runs), *(crossed(tables.answers(arm, batch_of(arm, batch), m)) for m in MODES)])
        last[-1].append(f"{where.mean:.2f} ± {where.half:.2f}" if where else "–")
    return [
        "## Beside the main arms",
        f"At batches of {batch} (`trace-twice`: {2 * batch} trace pairs, as many pairs as α = .5 has; `right-answers`: imitation of "
        "the chosen answers alone).",
        table(["arm", "runs", *(f"right {IN_MODE[mode]}, %" for mode in MODES), "last α"], last),
        compared([(IN_MODE[mode], arm, b) for mode, arm, b in cells], found),
    ]


def batch_of(arm: str, batch: int) -> int:
    return 2 * batch if arm == "trace-twice" else batch


def bias(tables: Tables) -> list[str]:
    if not tables.bias:
        return []
    lines = []
    for kind in dict.fromkeys(line["run"] for line in tables.bias):
        mine = [
            {k: float(v) for k, v in line.items() if k not in ("run", "seed")}
            for line in tables.bias
            if line["run"] == kind
        ]
        pairs = np.mean([line["t_pairs"] for line in mine])
        cells = [
            jackknife(mine, lambda s: s["bt_bt"] / s["be_be"]),
            jackknife(mine, lambda s: s["bt_be"] / s["be_be"]),
            jackknife(mine, lambda s: s["be_be"] / s["g_f"]),
            *(jackknife(mine, lambda s, k=k: shift(s, k)) for k in (1.0, 0.03)),
        ]
        lines.append([kind, len(mine), f"{pairs:.0f}", *cells])
    return [
        "## Is b_t = 0 harmless after a round?",
        "At trained adapters: b_t is the trace gradient on the untrained model's traces less that on the trained policy's own "
        "fresh ones, b_e the same of the empty gradient (benchmarks/study/bias.py; unbiased products of 16 folds, sums over "
        "seeds, jackknife over seeds). The last two columns: how far α moves when b_t is known, for batches of 8.",
        table(
            [
                "after",
                "runs",
                "pairs a fold",
                "‖b_t‖²/‖b_e‖²",
                "⟨b_t, b_e⟩/‖b_e‖²",
                "‖b_e‖²/‖E g‖²",
                "true α − α, κ = 1",
                "κ = .03",
            ],
            lines,
        ),
    ]


def shift(s: dict[str, float], kappa: float, batch: int = 8) -> float:
    """α with b_t known, less α with b_t = 0 in its place."""
    v_t, v_e = (s[f"v_{name}"] * s[f"{name}_pairs"] / batch for name in "te")
    # Rows of different folds: C is not measured here, and 0.
    w, apart = v_t + v_e, max(s["bt_bt"] - 2 * s["bt_be"] + s["be_be"], 0.0)
    true = (s["be_be"] - s["bt_be"] + kappa * v_e) / (apart + kappa * w)
    assumed = (apart + kappa * v_e) / (apart + kappa * w)
    return float(np.clip(true, 0, 1) - np.clip(assumed, 0, 1))


def jackknife(lines: list[dict[str, float]], of) -> str:
    def at(some: list[dict[str, float]]) -> float:
        return of({k: sum(line[k] for line in some) / len(some) for k in some[0]})

    n, whole = len(lines), at(lines)
    left_out = np.array([at(lines[:i] + lines[i + 1 :]) for i in range(n)])
    pseudo = n * whole - (n - 1) * left_out
    half = over_seeds(pseudo).half
    return f"{whole:.2f} ± {half:.2f}"


def layout(tables: Tables) -> list[str]:
    found = [name for name in tables.runs if name.endswith("-tp2pp2")]
    lines = []
    for name in found:
        one = name.removesuffix("-tp2pp2")
        pairs = list(zip(tables.steps[one], tables.steps[name], strict=True))
        lines.append(
            [
                one,
                *(f"{max(abs(float(a[k]) - float(b[k])) for a, b in pairs):.1e}" for k in ("loss", "alpha")),
                *(
                    f"{(tables.right[one, mode] == tables.right[name, mode]).mean():.3f} of {len(tables.right[one, mode])}"
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


# ---- words and tables


def percent(share: str) -> str:
    return f"{100 * float(share):.1f}"


def signed(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:+.1f} ± {100 * estimate.half:.1f}"


def number(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.half:.2f}"


def ratio(estimate: Estimate) -> str:
    """Of a log: the ratio and its interval."""
    low, middle, high = np.exp([estimate.mean - estimate.half, estimate.mean, estimate.mean + estimate.half])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
