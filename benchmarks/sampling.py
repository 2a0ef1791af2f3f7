"""`bvpo sample` against a server that answers at once: answers a second, CPU seconds and peak memory of the client.

    python benchmarks/sampling.py [--prompts 50000] [--samples 8] [--report FILE.md]

Server and client are two processes, so two cores: every request is a whole HTTP exchange with an answer of 40 tokens
and their log-probs (2.6 kB), half of them chat requests, half of them completions of the rendered prompt as token ids.
The server's answers are ready bytes: it costs about a third of the client's CPU. One prompt is 200 bytes.

Predicted before the first run: .55 ms of client CPU an answer (aiohttp .30, JSON of the reply .05, our own Python .15,
shards .05), so 1,800 answers/s on a core of its own; peak memory 350 MB, most of it pyarrow and the libraries (150 MB),
50,000 prompts (60 MB), one journal being compacted (100 MB); nothing grows with the number of samples but one bit each.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--judge", help="judge while sampling")
    parser.add_argument("--report", type=Path, help="append a row to this Markdown table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), args)
    print(json.dumps(row, indent=1))
    if args.report:
        append(args.report, row)


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """One run in a process of its own, and what it cost."""
    from tests.unit.chat_models import write_chat_model
    from tests.unit.openai_server import ServerProcess

    prompts = folder / "prompts.jsonl"
    with open(prompts, "w") as out:
        for i in range(args.prompts):
            out.write(json.dumps({"prompt": f"What is {i}? " + "Think of it well. " * 9, "answer": "4"}) + "\n")
    model = write_chat_model(folder / "model", "thinking")
    servers = [ServerProcess(quick=True) for _ in range(args.servers)]
    for server in servers:
        server.start()
    command = ["sample", str(prompts), "--out", str(folder / "out"), "--model", "m", "--max_tokens", "99"]
    command += ["--samples", str(args.samples), "--concurrency", str(args.concurrency), "--tokenizer", str(model)]
    command += ["--server", *(server.address for server in servers)]
    command += ["--judge", args.judge] if args.judge else []
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, *command], check=True, cwd=ROOT)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    for server in servers:
        server.kill()
    answers = args.prompts * args.samples * 2
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "answers": answers,
        "seconds": round(seconds, 1),
        "answers/s": round(answers / seconds),
        "client CPU s per 1,000 answers": round(1000 * cpu / answers, 3),
        "client peak memory, MB": round(after.ru_maxrss / 1024),
        "load before": os.getloadavg()[0],
        "CPU": platform.processor() or platform.machine(),
    }


def append(path: Path, row: dict) -> None:
    if not path.exists():
        path.write_text("| " + " | ".join(row) + " |\n|" + "---|" * len(row) + "\n")
    with open(path, "a") as out:
        out.write("| " + " | ".join(map(str, row.values())) + " |\n")


if __name__ == "__main__":
    main()
