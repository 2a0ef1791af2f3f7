"""How long `bvpo pairs` takes, and how much memory: synthetic prompts with samples in two modes.

    python benchmarks/pairing.py [--prompts 50000] [--samples 8] [--characters 1200]

Prints CPU seconds and the peak of resident memory of the command alone.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_bvpo.sampling.samples import JUDGEMENTS, PROMPTS, SAMPLES, Judgement, Prompt, Sample, write_shard

WORDS = "so then we add the two and see that it is more than before which cannot be right again check sum".split()


def write_folder(folder: Path, prompts: int, samples: int, characters: int) -> None:
    """Shards in the order in which answers arrive: the samples of a prompt are spread over them."""
    draw = random.Random(0)
    trace = " ".join(draw.choice(WORDS) for _ in range(characters))[: characters * 2]
    asked = [
        Prompt(f"q{i}", [{"role": "user", "content": f"What is {i}?"}], str(i), f"p:{i}", {}) for i in range(prompts)
    ]
    write_shard(folder / PROMPTS, asked, Prompt)
    rates = [draw.betavariate(0.6, 0.6) for _ in range(prompts)]
    shard, judged, number = [], [], 0
    for n in range(samples):
        for i in range(prompts):
            for mode in ("thinking", "empty"):
                right = draw.random() < rates[i]
                result = i if right else i + draw.randrange(1, 9)
                start, size = draw.randrange(characters), draw.randrange(characters // 4, characters)
                text = f"<think>\n{trace[start : start + size]}\n</think>\n\nIt is {result}."
                text = text if mode == "thinking" else f"It is {result}{'.' * draw.randrange(4)}"
                tokens = len(text) // 4
                shard.append(Sample(f"q{i}", mode, n, text, tokens, 9, "stop", -0.3 * tokens, 1.0, n, "s", 1.0))
                judged.append(Judgement(f"q{i}", mode, n, float(right), right, str(result)))
            if len(shard) >= 20000:
                write_shard(folder / SAMPLES / f"{number:05d}.parquet", shard, Sample)
                write_shard(folder / JUDGEMENTS / "math" / f"{number:05d}.parquet", judged, Judgement)
                shard, judged, number = [], [], number + 1
    write_shard(folder / SAMPLES / f"{number:05d}.parquet", shard, Sample)
    write_shard(folder / JUDGEMENTS / "math" / f"{number:05d}.parquet", judged, Judgement)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt in each of two modes")
    parser.add_argument("--characters", type=int, default=1200, help="of the longest trace")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=["--match_length"], help="of bvpo pairs; last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples"
        write_folder(samples, args.prompts, args.samples, args.characters)
        start = time.perf_counter()
        code = "import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "pairs", str(samples), "--out", f"{folder}/pairs.jsonl", *args.options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = sum(1 for _ in open(f"{folder}/pairs.jsonl", "rb"))
    print(
        f"{args.prompts} prompts × {args.samples} samples × 2 modes: {rows} rows in {wall:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} CPU seconds, {used.ru_maxrss / 2**20:.2f} GiB at most"
    )


if __name__ == "__main__":
    main()
