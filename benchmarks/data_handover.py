"""Time and memory from a data file to judged rows in a dataset, at a size where they matter.

    python benchmarks/data_handover.py [--rows 200000]

Two processes, as in a run: the launching process reads, judges and hands over; a rank loads what was handed over with
ms-swift's own `load_dataset`, shuffled, and takes the judged rows. Each is a process of its own, so that its peak is
its own. Predicted before the first run, for 200,000 rows on one core: 30 s and 0.3 GiB for the launching process
(0.1 ms to parse a row, 0.05 ms to judge and write it); 10 s for the rank beside what its libraries take to load, and
1.5 GiB, of which most is libraries and pages of the mapped file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TARGET = Path(__file__).parent / "results" / "data-handover-cpu.md"
WORDS = "the of a sum then so we check that it is right carry over next part both sides value of x is now".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--stage", choices=["launch", "rank"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return print(json.dumps(launch(args.file) if args.stage == "launch" else rank(args.file)))
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for ending in ("jsonl", "parquet"):
            file = Path(name, f"rows.{ending}")
            write(file, args.rows)
            env = {**os.environ, "MODELSCOPE_CACHE": f"{name}/cache-{ending}", "OMP_NUM_THREADS": "1"}
            for stage in ("launch", "rank"):
                command = [sys.executable, __file__, "--stage", stage, "--file", str(file)]
                out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[f"{ending}, {stage}"] = {**json.loads(out.splitlines()[-1]), "bytes": file.stat().st_size}
    TARGET.write_text(report(found, args.rows))
    print(TARGET.read_text())


def write(file: Path, count: int) -> None:
    """Rows of about 1.7 kB, as JSON lines or a table: a short trace a side, a third with own empty answers."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    def row(i: int) -> dict:
        sides = [f"<think>\n{text(150)}\n</think>\n\n{text(15)} {i} {side}" for side in ("yes", "no")]
        messages = [{"role": "user", "content": f"{i}: {text(20)}"}, {"role": "assistant", "content": sides[0]}]
        own = {"empty_response": text(10), "empty_rejected_response": text(11)} if i % 3 == 0 else {}
        return {"messages": messages, "rejected_response": sides[1], "id": i, **own}

    if file.suffix == ".jsonl":
        with file.open("w") as out:
            out.writelines(json.dumps(row(i)) + "\n" for i in range(count))
        return
    import pyarrow as pa
    from pyarrow import parquet

    names = ("messages", "rejected_response", "id", "empty_response", "empty_rejected_response")
    writer = None
    for start in range(0, count, 10_000):
        rows = [row(i) for i in range(start, min(start + 10_000, count))]
        table = pa.table({name: [entry.get(name) for entry in rows] for name in names})
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()


def launch(file: str) -> dict:
    started = clock()
    from megatron_bvpo.launching.start_checks import scan_data

    lines = scan_data(["--dataset", file])
    return {**since(started), **peak(), "said": lines[1]}


def rank(file: str) -> dict:
    from megatron_bvpo.rehearsal import install

    install(device=False, transformer_engine=True)
    import swift.megatron.pipelines.train.rlhf  # noqa: F401  before the other modules of swift.megatron
    from swift.dataset import load_dataset

    from megatron_bvpo.data.handover import Reading
    from megatron_bvpo.data.loading import judge_dataset
    from megatron_bvpo.data.rows import RowRules
    from megatron_bvpo.host.patches import apply_patches, no_row_lost

    apply_patches()
    before = peak()["gib"]
    started = clock()
    reading = Reading(RowRules(), {})
    with no_row_lost(reading, lambda path, report: None):
        dataset, _ = load_dataset([file], shuffle=True, load_from_cache_file=False)
    dataset, report = judge_dataset(dataset, reading, num_proc=1, load_from_cache_file=False)
    row = dataset[len(dataset) - 1]
    assert row["messages"][0]["role"] == "user"
    return {**since(started), **peak(), "libraries_gib": before, "said": report.tally.lines()[0]}


def clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def since(started: tuple[float, float]) -> dict:
    return {"seconds": time.monotonic() - started[0], "cpu": time.process_time() - started[1]}


def peak() -> dict:
    return {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def report(found: dict[str, dict], rows: int) -> str:
    lines = [
        "# From a data file to judged rows",
        "",
        f"`python benchmarks/data_handover.py --rows {rows}`; what was predicted stands in the script.",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}",
        f"- versions: Python {platform.python_version()}, {os.cpu_count()} cores, one thread",
        f"- load of the machine at the end, other work included: {os.getloadavg()[1]:.0f}",
        "",
        "| process | file, MB | seconds | of a core | peak GiB | of that, libraries | said |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in found.items():
        libraries = f"{run['libraries_gib']:.2f}" if "libraries_gib" in run else "–"
        cells = [f"{run['bytes'] / 1e6:.0f}", f"{run['seconds']:.1f}", f"{run['cpu']:.1f}", f"{run['gib']:.2f}"]
        lines.append(f"| {' | '.join([name, *cells, libraries, run['said']])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
