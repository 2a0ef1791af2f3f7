"""`python -m benchmarks.study`: all from nothing, on past every stop (benchmarks/study/run.sh sets up for it)."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from benchmarks.study.plan import (
    CHOOSING_SEED,
    HELDOUT_SEED,
    QUICK,
    Size,
    main_runs,
    more_runs,
    rate_runs,
    second_rounds,
    untrained,
)
from benchmarks.study.tables import Study
from benchmarks.study.work import Bench, as_worker
from megatron_bvpo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/study/run.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="all of it at sizes that mean nothing, in minutes")
    parser.add_argument("--out", type=Path, help="tables, plots and report.md (benchmarks/results/study)")
    parser.add_argument("--work", type=Path, help="pairs, adapters, and what is done (output/study-work)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)), help="runs at a time, a core each")
    parser.add_argument("--report", action="store_true", help="only write the report anew, from the tables")
    args = parser.parse_args()
    out = args.out or ROOT / ("output/study-quick" if args.quick else "benchmarks/results/study")
    size = QUICK if args.quick else Size()
    if not args.report:
        work = args.work or ROOT / ("output/study-quick-work" if args.quick else "output/study-work")
        try:
            run_all(Bench(work.resolve(), size), out, args.jobs)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    from benchmarks.study.report import write_report

    print(f"Report: {write_report(out, size)}")
    return 0


def run_all(bench: Bench, out: Path, jobs: int) -> None:
    """Pairs, the choice of the rate, all runs; the tables are written anew after each of them."""
    size, seeds = bench.size, bench.size.of_seeds
    study = Study(bench, out)
    pool_of = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"), initializer=as_worker)
    with bench.prepare(), pool_of(jobs) as pool:
        do = partial(in_parallel, pool, study)
        do("pairs", ((bench.make_pairs, seed) for seed in (CHOOSING_SEED, HELDOUT_SEED, *seeds)))
        do("rates", ((bench.train_and_evaluate, run) for run in rate_runs(size)))
        rates = study.chosen_rates()
        print(f"Learning rates, of trace only: {rates}", flush=True)
        first = main_runs(size, rates)
        do("runs", ((bench.train_and_evaluate, run) for run in first))
        do("untrained", ((bench.evaluate_base, seed) for seed in seeds))
        again = next(run for run in reversed(first) if run.arm == "auto" and run.seed == 1)
        do("on TP2 · PP2", [(bench.train_under_layout, again)])
        moved = [run for run in first if run.arm == "auto" and run.batch == max(size.batches)]
        do("b_t", ((bench.measure_bias, run) for run in moved))
        do("second look", ((bench.look_again, run) for run in (*map(untrained, seeds[:1]), *first)))
        do("more", ((bench.train_and_evaluate, run) for run in more_runs(size, rates)))
        rounds = second_rounds(size, rates)
        do("second round", ((bench.train_and_evaluate, run) for run in rounds))
        do("its second look", ((bench.look_again, run) for run in rounds))


def in_parallel(pool: ProcessPoolExecutor, study: Study, name: str, jobs: Iterable[tuple[Callable, object]]) -> None:
    """Do all, and write the tables as each is done.

    Raises:
        RuntimeError: some failed; the others were done first.
    """
    futures = [pool.submit(function, argument) for function, argument in jobs]
    failed = []
    for number, future in enumerate(as_completed(futures), 1):
        if (error := future.exception()) is not None:
            failed.append(f"{type(error).__name__}: {error}")
        else:
            study.write()
        print(f"{name}: {number} of {len(futures)}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {name} failed; the same command tries them again:\n" + "\n".join(failed))


if __name__ == "__main__":
    sys.exit(main())
