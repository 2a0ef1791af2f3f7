"""The truth bench: does the alpha estimator find the truth, and does its alpha train better?

    python benchmarks/truth_bench.py            everything, about half an hour on one idle core
    python benchmarks/truth_bench.py --quick    small samples, under a minute; to output/truth_bench
    python benchmarks/truth_bench.py --only frozen | training | fresh | streams | report

A reasoning model small enough to enumerate (truth_bench/model.py) gives the marginal loss and its gradient exactly,
so that bias, variance and the true optimum are known. Seeds are fixed. Tables and plots go to
benchmarks/results/truth_bench/.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from truth_bench import stream_studies, studies
from truth_bench.report import write_report

RESULTS = Path(__file__).parent / "results" / "truth_bench"
QUICK_RESULTS = Path(__file__).parents[1] / "output" / "truth_bench"


def write_csv(path: Path, rows: list[studies.Row]) -> None:
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small samples")
    parser.add_argument("--only", choices=["frozen", "training", "fresh", "streams", "report"], help="one part")
    parser.add_argument("--out", type=Path, help="folder of the tables")
    args = parser.parse_args()
    size = studies.QUICK if args.quick else studies.Size()
    out = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "frozen"):
        regimes, decays, kappas, paths = studies.frozen_rows(size)
        write_csv(out / "regimes.csv", regimes)
        write_csv(out / "decays.csv", decays)
        write_csv(out / "kappas.csv", kappas)
        write_csv(out / "paths.csv", [row for rows in paths.values() for row in rows])
        write_csv(out / "gap.csv", studies.gap_rows())
    if args.only in (None, "training"):
        rows, curves = studies.training_rows(size)
        write_csv(out / "training.csv", rows)
        write_csv(out / "curves.csv", curves)
    if args.only in (None, "fresh"):
        write_csv(out / "fresh.csv", studies.fresh_rows(size))
    if args.only in (None, "streams"):
        for name, rows in stream_studies.rows(size).items():
            write_csv(out / f"{name}.csv", rows)
        write_csv(out / "stream_training.csv", stream_studies.training_rows(size))
    print(write_report(out))


if __name__ == "__main__":
    main()
