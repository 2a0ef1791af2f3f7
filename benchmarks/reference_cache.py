"""What a reference cache changes in bf16 when the runs that share it have different layouts.

    python benchmarks/reference_cache.py

In float32 the difference is rounding (1e-5, tests/distributed/test_reference_cache.py). In bf16 the same row in
another layout gets other roundings in every layer. Here one rank fills a cache, one row a micro-batch, and two
ranks (TP 2 with sequence parallelism) read it, four rows a micro-batch. Set beside it: the same second run without
a cache, whose reference is rounded as its policy is. CPU ranks, a tiny random MoE: the sizes say what to look for,
not what a 235B model will show. (Micro-batches alone change nothing on a CPU, whose matrix products round a row
the same in any batch.)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.cells import CPU_FLAGS, Cell, run_cells

TARGET = Path(__file__).parent / "results" / "reference-cache-bf16.md"
KEYS = ("rewards/chosen", "rewards/margins", "empty/rewards/chosen", "empty/rewards/margins", "loss")
STEPS = 4


def main() -> None:
    from megatron_bvpo.rehearsal.sample_data import make_sample_rows
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model", kind="moe", vocab="trimmed")
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_sample_rows(32, seed=0)))
        # Later flags win over CPU_FLAGS, which ask for float32.
        shared = (
            f"--model {model} --model_type qwen3_moe --template qwen3_thinking --dataset {rows} --tuner_type lora "
            f"--lora_rank 4 --lora_dropout 0 --lr 1e-3 --beta 0.1 --global_batch_size 8 --train_iters {STEPS} "
            "--logging_steps 1 --max_length 512 --bvpo_alpha 0.5"
        )
        bf16 = "--torch_dtype bfloat16 --bf16 true"
        kept = f"--bvpo_ref_cache {folder / 'refs'}"

        def cell(name: str, more: str) -> Cell:
            command = [*shared.split(), *CPU_FLAGS, *bf16.split(), *more.split()]
            return Cell(name, command, hook_args={"lora_scale": 0.0, "gradients": False})

        found = run_cells(1, [cell("filled", f"--micro_batch_size 1 {kept}")], folder / "runs")
        two = "--tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 4"
        found |= run_cells(2, [cell("read", f"{two} {kept}"), cell("own", two)], folder / "runs")
    assert found["read"].steps("ref_cache/hits") == [1] * STEPS
    lines = [
        "# A reference cache in bf16, read in another layout",
        "",
        "`python benchmarks/reference_cache.py`: filled by one rank, read under TP 2, against no cache under TP 2.",
        "",
        "| step | " + " | ".join(f"{key}: cache | none" for key in KEYS) + " |",
        "|---" * (1 + 2 * len(KEYS)) + "|",
    ]
    for step in range(STEPS):
        values = (f"{found['read'].steps(k)[step]:+.4f} | {found['own'].steps(k)[step]:+.4f}" for k in KEYS)
        lines.append(f"| {step + 1} | " + " | ".join(values) + " |")
    for key in KEYS:
        gap = max(abs(a - b) for a, b in zip(found["read"].steps(key), found["own"].steps(key), strict=True))
        lines.append(f"\nLargest difference of `{key}`: {gap:.1e}." if key == KEYS[0] else f"Of `{key}`: {gap:.1e}.")
    text = "\n".join(lines) + "\n"
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
