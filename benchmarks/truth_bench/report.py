"""Tables, verdicts and plots from the CSV files of one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from truth_bench.stream_report import fresh_part, stream_part
from truth_bench.tables import RECOMMENDED, Row, mean_and_interval, num, percent, read, regrets, table


def write_report(out: Path) -> str:
    """Writes report.md and the plots next to the tables; returns the text."""
    from truth_bench import plots

    parts = ["# Truth bench: results", "Written by `python benchmarks/truth_bench.py`; do not edit by hand."]
    if (out / "regimes.csv").exists():
        parts += frozen_part(*(read(out / f"{name}.csv") for name in ("regimes", "decays", "gap", "kappas")))
        plots.alpha_paths(read(out / "paths.csv"), read(out / "regimes.csv"), out / "alpha_paths.png")
        plots.gap(read(out / "gap.csv"), out / "gap.png")
    if (out / "training.csv").exists():
        rows = read(out / "training.csv")
        parts += training_part(rows)
        plots.regret_by_kappa(regrets(rows, "final_loss"), out / "regret.png")
        plots.training_curves(read(out / "curves.csv"), out / "training.png")
    if (out / "fresh.csv").exists():
        parts += fresh_part(read(out / "fresh.csv"))
    if (out / "streams.csv").exists() and (out / "stream_training.csv").exists():
        names = ("streams", "stream_regret", "stream_bands", "stream_training")
        parts += stream_part(*(read(out / f"{name}.csv") for name in names))
        plots.stream_paths(read(out / "stream_paths.csv"), out / "stream_paths.png")
        plots.stream_regret(read(out / "stream_regret.csv"), out / "stream_regret.png")
    text = "\n\n".join(parts) + "\n"
    (out / "report.md").write_text(text)
    return text


# ---------------------------------------------------------------------- the estimator on a policy that stands still


def frozen_part(regimes: list[Row], decays: list[Row], gap: list[Row], kappas: list[Row]) -> list[str]:
    truth = table(
        ["regime", "what", "pairs", "V_t/V_e", "corr.", "\\|b_e\\|²/D", "\\|b_t\\|/\\|b_e\\|", "α°", "α*", "worst z"],
        [
            [
                r["regime"],
                r["what"],
                r["pairs"],
                num(r, "noise_ratio", 1),
                num(r, "correlation", 2),
                num(r, "bias_share", 2),
                num(r, "bias_ratio"),
                num(r, "alpha_circ"),
                num(r, "alpha_star"),
                num(r, "worst_z", 1),
            ]
            for r in regimes
        ],
    )
    memory = table(
        ["regime", "sd of one probe", "probes for ±0.03", "mean α", "rms error", "runs within 0.03 of α°", "of α*"],
        [
            [
                r["regime"],
                num(r, "one_probe_sd", 2),
                r["probes_for_003"],
                num(r, "long_mean"),
                num(r, "long_rms"),
                f"{100 * float(r['long_within']):.0f} %",
                f"{100 * float(r['long_within_star']):.0f} %",
            ]
            for r in regimes
        ],
    )
    parts = [
        "## The truth",
        "Enumerated. `worst z`: how many standard errors the mean D̂, X̂ or Ŵ of the pool is off.",
        truth,
        "## With probes enough",
        "`probes for ±0.03`: as many equally weighted probes put 95 % of the runs within 0.03. The other columns are "
        "runs of that length with a memory twenty times as long.",
        memory,
    ]
    for decay in sorted({r["decay"] for r in decays}):
        at = {r["regime"]: r for r in decays if r["decay"] == decay}
        parts += [f"## At decay {decay}", decay_table(regimes, at)]
    parts += ["## Verdicts", verdicts(regimes, decays, kappas)]
    parts += [
        "## The sgd criterion against its own aim, decay 0.9",
        "A small κ rests on B = D − W, a small difference of large numbers: the band is wide, and covers. Coverage is "
        "of ± 2 s.e. from the 8th probe on.",
        table(
            ["regime", "κ", "α_κ", "bias", "rms error", "mean s.e.", "coverage"],
            [
                [
                    r["regime"],
                    r["kappa"],
                    num(r, "alpha_kappa"),
                    num(r, "bias"),
                    num(r, "rms"),
                    num(r, "stderr"),
                    f"{100 * float(r['coverage']):.1f} %",
                ]
                for r in kappas
            ],
        ),
    ]
    parts += [
        "## What b_t = 0 costs",
        "The trace loss is descended exactly, away from a sampler that stays. `cost`: gradient MSE at α° over "
        "that at α*.",
        table(
            ["regime", "step", "L_m", "\\|b_t\\|/\\|b_e\\|", "α°", "α*", "cost, %"],
            [
                [
                    r["regime"],
                    r["step"],
                    num(r, "loss"),
                    num(r, "bias_ratio", 2),
                    num(r, "alpha_circ"),
                    num(r, "alpha_star"),
                    percent(r, "mse_cost"),
                ]
                for r in gap
                if int(r["step"]) in (0, 25, 50, 100, 200, 300)
            ],
        ),
    ]
    return parts


def decay_table(regimes: list[Row], at: dict[str, Row]) -> str:
    head = [
        "regime",
        "bias",
        "rms error",
        "coverage",
        "lagged auto, %",
        "probes 8–40, %",
        "after probe 8, %",
        "trace, %",
        "half, %",
        "empty, %",
        "oracle, %",
        "same batch − lagged, %",
    ]
    rows = []
    for r in regimes:
        d = at[r["regime"]]
        lag = 100 * (float(d["realised_same_batch"]) - float(d["realised_lagged"]))
        rows.append(
            [
                r["regime"],
                num(d, "bias"),
                num(d, "rms"),
                f"{100 * float(d['coverage']):.1f} %",
                percent(d, "mse"),
                percent(d, "mse_8_40"),
                percent(d, "mse_8"),
                percent(r, "mse_trace"),
                percent(r, "mse_half"),
                percent(r, "mse_empty"),
                percent(r, "mse_star"),
                f"{lag:+.1f}",
            ]
        )
    return "Per cent columns: true gradient MSE over that at α°.\n\n" + table(head, rows)


def verdicts(regimes: list[Row], decays: list[Row], kappas: list[Row]) -> str:
    def line(name: str, bad: list[str]) -> str:
        return f"- {name}: " + ("met in every regime" if not bad else "**not met** in " + ", ".join(bad))

    def failing(rows: list[Row], wrong: Callable[[Row], bool]) -> list[str]:
        return [r["regime"] for r in rows if wrong(r)]

    near = [r for r in regimes if float(r["bias_ratio"]) <= 0.05]
    lines = [
        line("moments unbiased (|z| < 4)", failing(regimes, lambda r: float(r["worst_z"]) >= 4)),
        line(
            "mean α within 0.03 of α° with probes enough",
            failing(regimes, lambda r: abs(float(r["long_mean"]) - float(r["alpha_circ"])) > 0.03),
        ),
        line(
            "at least 90 % of runs within 0.03 of α° with probes enough",
            failing(regimes, lambda r: float(r["long_within"]) < 0.9),
        ),
        line(
            f"mean α within 0.03 of α* where ‖b_t‖ ≤ 0.05 ‖b_e‖ ({len(near)} regimes)",
            failing(near, lambda r: abs(float(r["long_mean"]) - float(r["alpha_star"])) > 0.03),
        ),
    ]
    by_name = {r["regime"]: r for r in regimes}
    for decay in sorted({r["decay"] for r in decays}):
        at = [r for r in decays if r["decay"] == decay]
        lines.append(
            line(f"decay {decay}: coverage 90–98 %", failing(at, lambda r: not 0.9 <= float(r["coverage"]) <= 0.98))
        )
        lines.append(
            line(f"decay {decay}: settled MSE within 5 % of α°'s", failing(at, lambda r: float(r["mse"]) > 0.05))
        )
        lines.append(
            line(f"decay {decay}: MSE of probes 8–40 within 5 %", failing(at, lambda r: float(r["mse_8_40"]) > 0.05))
        )
        for fixed in ("trace", "half"):

            def beaten(r: Row, fixed: str = fixed) -> bool:
                rival = float(by_name[r["regime"]][f"mse_{fixed}"])
                # alpha°'s MSE is lower than the rival's by more than 5 % of the rival's
                return 1 / (1 + rival) < 0.95 and float(r["mse"]) >= rival

            lines.append(line(f"decay {decay}: below {fixed} wherever α° is by more than 5 %", failing(at, beaten)))
    for kappa in dict.fromkeys(r["kappa"] for r in kappas):
        at = [r for r in kappas if r["kappa"] == kappa]
        off = failing(at, lambda r: not 0.9 <= float(r["coverage"]) <= 0.98)
        lines.append(line(f"sgd, κ = {kappa}: coverage of its own aim 90–98 %", off))
    return "\n".join(lines)


# ---------------------------------------------------------------------- training


def training_part(rows: list[Row]) -> list[str]:
    final, whole = regrets(rows, "final_loss"), regrets(rows, "mean_loss")
    names = list(next(iter(final.values())))

    def stack(results, arm: str, keep: Callable[[tuple[str, str, str]], bool] = lambda s: True) -> np.ndarray:
        return np.array([v[arm] for s, v in results.items() if keep(s)])

    groups = sorted({s[1:] for s in final}, key=lambda g: (g[0] == "adam", float(g[1])))
    overall = []
    for arm in names:
        all_final = stack(final, arm)
        overall.append(
            [
                arm,
                mean_and_interval(all_final),
                f"{np.median(all_final.mean(1)):.1f}",
                f"{all_final.mean(1).max():.0f}",
                mean_and_interval(stack(whole, arm)),
                mean_and_interval(all_final - stack(final, RECOMMENDED)),
                *(f"{stack(final, arm, lambda s, g=g: s[1:] == g).mean():.1f}" for g in groups),
            ]
        )
    head = ["arm", "mean", "median", "worst setting", "whole run", f"mean − {RECOMMENDED}"]
    head += [f"SGD ηL = {g[1]}" if g[0] == "sgd" else f"Adam {g[1]}" for g in groups]
    regimes = list(dict.fromkeys(s[0] for s in final))
    by_regime = [
        [arm, *(f"{stack(final, arm, lambda s, r=r: s[0] == r).mean():.1f}" for r in regimes)] for arm in names
    ]
    alphas = defaultdict(list)
    for r in rows:
        alphas[r["arm"], r["regime"]].append(float(r["alpha"]))
    alpha_rows = [[arm, *(f"{np.mean(alphas[arm, r]):.2f}" for r in regimes)] for arm in names]
    return [
        "## Training",
        "Marginal loss at the end of the run (mean over its last tenth) above the best arm's, in per cent of what the "
        f"best arm gained; {len(final)} settings (regime × optimizer × rate). ± is a 95 % interval over seeds. "
        "`whole run`: the same for the loss averaged over the run. `mean − …`: paired by seed. Steps are the same for "
        "every rate. The oracle is α* of the policy as it stands, so the least gradient MSE.",
        table(head, overall),
        "### By regime",
        table(["arm", *regimes], by_regime),
        "### α at the end of the run",
        table(["arm", *regimes], alpha_rows),
    ]
