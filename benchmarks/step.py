"""Whole training steps, side by side: ms-swift's Megatron DPO, BVPO, and BVPO with a warm reference cache.

    python benchmarks/step.py --ranks 8 --flags "--tensor_model_parallel_size 2 --sequence_parallel true …"
    python benchmarks/step.py --tiny          # rehearsal on one CPU rank, at sizes that mean little

All three train the same LoRA on the same rows, in turns and in changing order; the runs of a round share their
processes. DPO has the trace pairs only, and BVPO has the empty-trace pairs with them. A step's time is the slowest
rank's; the table shows medians over the rounds' medians and the range of the rounds' ratios to DPO of the same
round. Peak memory is what torch allocated at most on any rank (GPU only).

Predictions, written before the first run. With a frozen base and no recompute a step is a reference forward (1),
a policy forward (1) and a backward of the activations alone (1): BVPO costs DPO's step times (trace + empty
tokens) / trace tokens, and a warm cache takes a third of that away. With full recompute the backward costs 2, and
a warm cache takes a quarter. Peak memory is the policy's alone in all three, so it differs by the empty tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

RESULTS = Path(__file__).parent / "results"
MODES = ("dpo", "bvpo", "bvpo, warm cache")
# About 1.6 B parameters, 0.3 B of them active: what one GPU trains with room to spare.
BIG = dict(
    num_layers=16,
    hidden_size=1536,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=96,
    num_experts=16,
    experts_per_token=4,
    moe_intermediate_size=768,
    vocab_size=151_936,
)
GPU_FLAGS = (
    "--torch_dtype bfloat16 --attention_backend flash --check_model false --add_version false --report_to none "
    "--recompute_granularity selective"
).split()
# The stand-ins have no fused kernels, and one process reads the rows.
STAND_IN_FLAGS = (
    "--gradient_accumulation_fusion false --masked_softmax_fusion false --bias_dropout_fusion false "
    "--moe_permute_fusion false --dataloader_num_workers 0 --dataloader_persistent_workers false "
    "--load_from_cache_file false"
).split()
BF16_FLAGS = "--bf16 true --torch_dtype bfloat16".split()


def record_times(base, folder):
    """Time every step with the device idle at both ends; keep the peak of memory."""
    import torch
    import torch.distributed as dist

    class Timed(base):
        def train_step(self, *args):
            self.times = getattr(self, "times", [])
            _wait()
            start = time.perf_counter()
            found = super().train_step(*args)
            _wait()
            self.times.append(time.perf_counter() - start)
            return found

        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def train(self, *args):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            super().train(*args)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            found: list = [None] * dist.get_world_size()
            dist.all_gather_object(found, (getattr(self, "times", []), peak))
            if dist.get_rank() == 0:
                slowest = [max(step) for step in zip(*(times for times, _ in found), strict=True)]
                torch.save({"times": slowest, "peak": max(peak for _, peak in found)}, folder / "recorded.pt")

    def _wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()

    return Timed


def shared_flags(options) -> list[str]:
    """What every run is given, the stock one too."""
    own = [*GPU_FLAGS, *(STAND_IN_FLAGS if options.stand_ins else ())] if options.gpu else [*CPU_FLAGS]
    if options.bf16 and not options.gpu:
        own = merged(own, BF16_FLAGS)
    shared = (
        f"--model {options.model} --model_type qwen3_moe --template qwen3_thinking --dataset {options.rows} "
        f"--tuner_type lora --lora_rank 16 --lora_dropout 0 --lr 1e-5 --beta 0.1 "
        f"--micro_batch_size {options.micro_batch} --global_batch_size {options.global_batch} "
        f"--train_iters {options.steps} --logging_steps 1 --max_length {options.length} {options.flags}"
    )
    return [*shared.split(), *own]


def merged(flags: list[str], more: list[str]) -> list[str]:
    """`--flag value` pairs; the later one of a flag counts."""
    found = dict(zip(flags[::2], flags[1::2], strict=True)) | dict(zip(more[::2], more[1::2], strict=True))
    return [token for pair in found.items() for token in pair]


def rounds(options, cache: Path) -> list[list[Cell]]:
    """The cells of each round; the first one fills the cache, and does not count."""
    stock = [*shared_flags(options), "--save_steps", "100000"]
    ours = [*stock, "--bvpo_alpha", "0.5"]
    kept = ["--bvpo_ref_cache", str(cache)]
    hook = "benchmarks.step:record_times"
    found = [[Cell("refs", [*ours, *kept, "--bvpo_refs_only", "true"], hook=hook)]]
    for r in range(options.rounds):
        cells = [
            Cell(f"dpo-{r}", stock, hook=hook, type="dpo"),
            Cell(f"bvpo-{r}", ours, hook=hook),
            Cell(f"bvpo, warm cache-{r}", [*ours, *kept], hook=hook),
        ]
        found.append(cells[r % 3 :] + cells[: r % 3])
    return found


def measure(options, folder: Path) -> list[dict]:
    """Run all rounds in `folder`; the rows of the table."""
    parts = rounds(options, folder / "refs")
    if not options.forked:  # loading the stack anew for each round would take longer than the rounds
        parts = [[cell for part in parts for cell in part]]
    found: dict = {}
    for cells in parts:
        found |= run_cells(options.ranks, cells, folder / "runs", rehearsal=options.stand_ins, forked=options.forked)
    return table(found, options)


def table(found: dict, options) -> list[dict]:
    rows = []
    median = {
        mode: [
            statistics.median(found[f"{mode}-{r}"].recorded["times"][options.warmup :]) for r in range(options.rounds)
        ]
        for mode in MODES
    }
    for mode in MODES:
        ratios = [a / b for a, b in zip(median[mode], median["dpo"], strict=True)]
        peak = max(found[f"{mode}-{r}"].recorded["peak"] for r in range(options.rounds))
        rows.append(
            {
                "mode": mode,
                "step_ms": 1e3 * statistics.median(median[mode]),
                "ratio_to_dpo": spread(ratios),
                "ratio_to_bvpo": spread([a / b for a, b in zip(median[mode], median["bvpo"], strict=True)]),
                "peak_gib": peak / 2**30 if peak else None,
            }
        )
    return rows


def spread(ratios: list[float]) -> list[float]:
    return [min(ratios), statistics.median(ratios), max(ratios)]


def markdown(rows: list[dict], about: dict) -> str:
    lines = ["# Whole training steps", "", f"`{about['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name != "command"]
    lines += ["", "| step of | ms | of DPO's (lowest – highest round) | peak GiB |", "|---|---|---|---|"]
    for row in rows:
        low, middle, high = row["ratio_to_dpo"]
        peak = "not measured" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        lines.append(f"| {row['mode']} | {row['step_ms']:.0f} | {middle:.2f} ({low:.2f} – {high:.2f}) | {peak} |")
    low, middle, high = next(r for r in rows if r["mode"] == "bvpo, warm cache")["ratio_to_bvpo"]
    told = f"With a warm cache a BVPO step takes {middle:.2f} ({low:.2f} – {high:.2f}) of one without."
    return "\n".join([*lines, "", told, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--flags", default="", help="more flags for all three, such as the layout")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="first steps of each run that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU ranks")
    parser.add_argument("--stand-ins", action="store_true", help="on a GPU without Transformer Engine")
    options = parser.parse_args()

    import torch

    from megatron_bvpo.rehearsal.sample_data import make_sample_rows
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    options.gpu, options.bf16 = torch.cuda.is_available() and not options.tiny, False
    if not options.gpu and not options.tiny:
        parser.error("no GPU is visible; --tiny rehearses on a CPU")
    options.stand_ins, options.forked = options.stand_ins or not options.gpu, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = BIG if options.gpu else {}
        vocab = "real" if options.gpu else "trimmed"
        options.model = make_tiny_model(folder / "model", kind="moe", vocab=vocab, **sizes)
        options.rows = folder / "rows.jsonl"
        n = options.steps * options.global_batch
        options.rows.write_text("".join(json.dumps(row) + "\n" for row in make_sample_rows(n, seed=0)))
        measured = measure(options, folder)
    about = {
        "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": f"{options.ranks} × {torch.cuda.get_device_name(0) if options.gpu else 'CPU rank'}",
        "Transformer Engine": "stand-ins of plain PyTorch" if options.stand_ins else "real",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "steps": f"{options.steps} a run, the first {options.warmup} left out, {options.rounds} rounds",
    }
    text = markdown(measured, about)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / ("step-tiny-cpu" if options.tiny else "step-gpu")
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "rows": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
