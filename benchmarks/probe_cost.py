"""What measuring alpha costs: the steps of `--bvpo_alpha auto` beside those of a fixed alpha, in one run.

    python benchmarks/probe_cost.py                 # the rehearsal's model, layout and batch, on four CPU ranks
    python benchmarks/probe_cost.py --ranks 1       # the same without a layout
    python benchmarks/probe_cost.py --ranks 8 --flags "--model … --model_type … --bf16 true …"    # a real model

One run trains in blocks of `--interval` steps, in turns: a block of `auto`, whose first step is a probe, and a block
of the same alpha fixed, on the same batches. So both see the same process, memory and machine, and a slow minute hits
both. A step's time is the slowest rank's. The first interval (which is all probes) is warm-up. The table has the
median of the blocks' ratios, their range, and the medians of both kinds of steps.

Predictions, written before the first run. A probe passes every token of both streams forward and backward once, as a
one-pass step does; on top come two to four times as many micro-batches of a half or a quarter of the size (launch
overhead, and pipeline bubbles: four fills and drains for one), three copies of the gradient shard and three reads of
all four. On one CPU rank of the tiny model overhead rules: a probe costs 1.2 to 1.6 steps, so auto 1.02 to 1.06 at
interval 10. On four ranks on two cores, where a step is mostly waiting for others: 1.5 to 2.5 steps, so 1.05 to 1.15.
At real sizes, where a micro-batch fills the device: 1.1 to 1.3 steps, so 1.01 to 1.03.

Outcome on two shared cores: 1.15 steps on one rank, below the prediction, and 1.29 on four, far below it; perhaps
because one rank computes on the core of another that waits in a bubble. Real sizes are not measured yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

RESULTS = Path(__file__).parent / "results"
LAYOUT = (
    "--tensor_model_parallel_size 2 --sequence_parallel true --pipeline_model_parallel_size 2 "
    "--expert_model_parallel_size 2"
)


def alternate(base, folder, interval: int):
    """Blocks of `interval` steps: auto where the block's number is odd, the alpha of that moment fixed where even.

    The blocks of a pair see the same batches, so their time differs by the probe alone.
    """
    import torch
    import torch.distributed as dist

    class Alternating(base):
        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def _take_global_batch(self, iterator):
            self.batches = getattr(self, "batches", {})
            place = self.state.iteration % interval
            if place not in self.batches:
                self.batches[place] = super()._take_global_batch(iterator)
            return self.batches[place]

        def train_step(self, *args):
            self.times = getattr(self, "times", [])
            fixed = self.state.iteration // interval % 2 == 0 and self.state.iteration >= interval
            probes, plan = self.mixture.estimator.probes, self.probes.plan
            if fixed:
                self.probes.plan = lambda *args: None
            try:
                _wait()
                start = time.perf_counter()
                found = super().train_step(*args)
                _wait()
                self.times.append((time.perf_counter() - start, self.mixture.estimator.probes > probes))
            finally:
                self.probes.plan = plan
            return found

        def finalize_training(self):
            super().finalize_training()
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self.times)
            if dist.get_rank() == 0:
                steps = [(max(t for t, _ in step), step[0][1]) for step in zip(*gathered, strict=True)]
                torch.save({"steps": steps}, folder / "recorded.pt")

    def _wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()

    return Alternating


def measured(steps: list[tuple[float, bool]], interval: int) -> dict:
    """Ratios of the pairs of blocks, and the medians of their kinds of steps."""
    blocks = [steps[i : i + interval] for i in range(interval, len(steps), interval)]  # the first is warm-up
    pairs = list(zip(blocks[0::2], blocks[1::2], strict=False))
    for auto, fixed in pairs:
        probes = [probe for _, probe in auto]
        assert probes[0] and not any(probes[1:]), f"a block of auto should be one probe and {interval - 1} others"
        assert not any(probe for _, probe in fixed)
    ratios = [sum(t for t, _ in auto) / sum(t for t, _ in fixed) for auto, fixed in pairs]
    probe = [auto[0][0] / fixed[0][0] for auto, fixed in pairs]  # the same batch
    return {
        "pairs_of_blocks": len(pairs),
        "auto_to_fixed": [min(ratios), statistics.median(ratios), max(ratios)],
        "probe_to_one_pass": [min(probe), statistics.median(probe), max(probe)],
        "one_pass_ms": 1e3 * statistics.median(t for _, fixed in pairs for t, _ in fixed),
        "probe_ms": 1e3 * statistics.median(auto[0][0] for auto, _ in pairs),
    }


def markdown(found: dict, about: dict) -> str:
    def spread(key: str) -> str:
        low, middle, high = found[key]
        return f"{middle:.3f} ({low:.3f} – {high:.3f})"

    lines = ["# What measuring alpha costs", "", f"`{about['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "command"]
    lines += [
        "",
        "| what | median (lowest – highest of the pairs of blocks) |",
        "|---|---|",
        f"| step time of auto / fixed alpha, probe interval {about['interval']} | {spread('auto_to_fixed')} |",
        f"| probe step / one-pass step on the same batch, r | {spread('probe_to_one_pass')} |",
        f"| 1 + (r − 1) / {about['interval']}: what r alone makes of the first line | {implied(found, about)} |",
        f"| one-pass step | {found['one_pass_ms']:.0f} ms |",
        f"| probe step | {found['probe_ms']:.0f} ms |",
        "",
    ]
    return "\n".join(lines)


def implied(found: dict, about: dict) -> str:
    """The steps that are no probes run the same code in both arms; without their noise this is left."""
    low, middle, high = (1 + (r - 1) / about["interval"] for r in found["probe_to_one_pass"])
    return f"{middle:.3f} ({low:.3f} – {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--flags", default="", help="more flags, such as another layout or a real model")
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks")
    parser.add_argument("--name", default=None, help="of the files in benchmarks/results")
    options = parser.parse_args()

    import torch

    from megatron_bvpo.rehearsal.prepare import prepare

    gpu = torch.cuda.is_available() and os.environ.get("BVPO_REHEARSAL") != "1"
    steps = options.interval * (1 + 2 * options.pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, vocab="real")  # whose head takes its share of a step
        flags = (
            f"--model {folder}/model --model_type qwen3_moe --template qwen3_thinking --dataset {folder}/train.jsonl "
            "--tuner_type lora --target_modules all-linear --lora_rank 16 --lora_alpha 32 --lora_dropout 0 --lr 5e-4 "
            "--beta 0.1 --micro_batch_size 4 --global_batch_size 8 --max_length 512 --logging_steps 1 "
            f"--save_steps 100000 --train_iters {steps} --bvpo_alpha auto --bvpo_probe_interval {options.interval}"
        ).split()
        layout = LAYOUT if options.ranks == 4 and not options.flags else ""
        given = [*flags, *([] if gpu else CPU_FLAGS), *layout.split(), *options.flags.split()]
        hook_args = {"interval": options.interval}
        cell = Cell("run", given, hook="benchmarks.probe_cost:alternate", hook_args=hook_args)
        done = run_cells(options.ranks, [cell], folder / "runs", rehearsal=not gpu)["run"]
    found = measured(done.recorded["steps"], options.interval)
    about = {
        "command": " ".join(["python benchmarks/probe_cost.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": f"{options.ranks} × {torch.cuda.get_device_name(0) if gpu else 'CPU rank'}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "layout": layout or options.flags or "none",
        "interval": options.interval,
        "steps": f"{steps}: {options.interval} of warm-up, {found['pairs_of_blocks']} pairs of blocks",
    }
    text = markdown(found, about)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / (options.name or f"probe-cost-{'gpu' if gpu else 'cpu'}-{options.ranks}")
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
