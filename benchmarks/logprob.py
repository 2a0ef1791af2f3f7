"""Time, peak memory and error of target log-probs, against the peers that are installed.

    python benchmarks/logprob.py                      # on a GPU: N = 4k, 32k, 128k; writes results/logprob-<device>.*
    python benchmarks/logprob.py --sweep              # on a GPU: tile sizes of our own path, to set tile_sizes.py
    python benchmarks/logprob.py --tiny               # rehearsal anywhere, at sizes that mean nothing

Per setting (no grad; frozen head: forward and backward to the hidden states; trainable head: to both) one
table, a row for each N and a column for each provider. Times are medians. Peak memory is what the call adds to
its inputs, gradients included. Errors are against float64 on the first tokens: the largest of a logp, and
the median relative one of a token's dX. A provider that is not installed or fails is named, never left out.

The floor of a setting is its matrix products (1, 2 or 4 of 2·N·H·V operations) at the rate that an 8192³ bf16
product reached in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.logprob_peers import PEERS, Unavailable
from megatron_bvpo.kernels.reference import reference_logps

MODELS = {"qwen3-235b": (4096, 151_936), "qwen3-1.7b": (2048, 151_936)}  # H, V
TOKENS = (4096, 32_768, 131_072)
TINY_MODELS = {"tiny": (64, 1003)}
TINY_TOKENS = (96, 200)
SETTINGS = {"no grad": 1, "frozen": 2, "trainable": 4}  # matrix products that the setting needs here
CHECKED_TOKENS = 64
SWEEP = {
    "no grad": [(1024, 8448), (2048, 8448), (4096, 2112), (2048, 4224), (1024, 16_896), (1024, 151_936)],
    "frozen": [(512, 151_936), (1024, 151_936), (2048, 151_936), (2048, 75_968), (4096, 37_984)],
    "trainable": [(4096, 8192), (8192, 4096), (8192, 8192), (8192, 16_384)],
}


def median_ms(call, device: torch.device) -> float:
    if device.type == "cuda":
        import triton.testing

        return triton.testing.do_bench(call, warmup=200, rep=1500, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_gib(call, device: torch.device) -> float | None:
    """Most memory that the call held beyond what was there before; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """TFLOP/s of a large bf16 product on random data, and TB/s of a large copy (bytes read plus written)."""
    side, count = (256, 2**16) if tiny else (8192, 2**32)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, device)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    return {"matrix_tflops": 2 * side**3 / product_ms / 1e9, "copy_tbs": 2 * count / copy_ms / 1e9}


def inputs(n: int, hidden: int, vocab: int, device: torch.device):
    """Random data with targets likely enough (p from 1e-4 to near 1) for errors in dX to mean something."""
    g = torch.Generator(device).manual_seed(n)
    weight = torch.randn(vocab, hidden, generator=g, device=device) / hidden**0.5 * 2
    targets = torch.randint(0, vocab, (n,), generator=g, device=device)
    x = torch.randn(n, hidden, generator=g, device=device)
    x += torch.linspace(0, 8, n, device=device)[torch.randperm(n, generator=g, device=device), None] * weight[targets]
    upstream = torch.randn(n, generator=g, device=device)
    return x.bfloat16(), weight.bfloat16(), targets, upstream


@functools.lru_cache(maxsize=1)
def truth(n: int, hidden: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, dX) of the first tokens in float64, on the device, once for all providers and settings."""
    x, weight, targets, upstream = inputs(n, hidden, vocab, device)
    x = x[:CHECKED_TOKENS].double().requires_grad_()
    logps = reference_logps(x, weight, targets[:CHECKED_TOKENS])
    return logps.detach(), torch.autograd.grad(logps, x, upstream[:CHECKED_TOKENS].double())[0]


def errors(logps, grad, true_logps, true_grad) -> dict[str, float | None]:
    """Of a provider with per-token results; None where it has none."""
    out = {"logp_error": None, "dx_error": None}
    if logps.dim() == 0:
        return out
    checked = true_logps.shape[0]
    out["logp_error"] = (logps[:checked].double() - true_logps).abs().max().item()
    if grad is not None:
        wrong = (grad[:checked].double() - true_grad).norm(dim=1) / true_grad.norm(dim=1)
        out["dx_error"] = wrong.median().item()
    return out


def measure(make, setting: str, n: int, hidden: int, vocab: int, device, options: dict) -> dict:
    """One cell: {"ms", "gib", errors} or {"failed": why}."""
    x, weight, targets, upstream = inputs(n, hidden, vocab, device)
    x.requires_grad_(setting != "no grad")
    weight.requires_grad_(setting == "trainable")
    try:
        logps_of = make(**options)

        def call():
            x.grad = weight.grad = None
            with torch.set_grad_enabled(setting != "no grad"):
                logps = logps_of(x, weight, targets)
            if setting != "no grad":
                # A provider with a reduced loss has no upstream gradient per token.
                logps.backward(upstream if logps.dim() else None)
            return logps.detach()

        logps = call()
        cell = errors(logps, x.grad, *truth(n, hidden, vocab, device))
        cell["per_token"] = logps.dim() > 0
        x.grad = weight.grad = logps = None
        cell["gib"] = peak_gib(call, device)
        cell["ms"] = median_ms(call, device)
        return cell
    except Unavailable as why:
        return {"failed": f"missing: {why}"}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # a peer's own failure is a result, not the end of the run
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
    finally:
        x.grad = weight.grad = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def text(cell: dict, floor_ms: float | None) -> str:
    if "failed" in cell:
        return cell["failed"]
    parts = [f"{cell['ms']:.2f} ms"]
    if floor_ms:
        parts.append(f"{cell['ms'] / floor_ms:.2f}×")
    if cell["gib"] is not None:
        parts.append(f"{cell['gib']:.2f} GiB")
    for name, key in (("logp", "logp_error"), ("dX", "dx_error")):
        if cell[key] is not None:
            parts.append(f"{name} {cell[key]:.0e}")
    return ", ".join(parts) + ("" if cell["per_token"] else " (reduced loss only)")


def report(title: str, row_name: str, rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"### {title}", "", f"| {row_name} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def machine(device: torch.device) -> dict[str, str]:
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformer-engine")
    versions = {}
    for package in (*packages, "megatron-core"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return {"device": name, "date": datetime.date.today().isoformat(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="rehearse at sizes that run anywhere")
    parser.add_argument("--sweep", action="store_true", help="time tile sizes of our path instead of peers")
    parser.add_argument("--tokens", type=int, nargs="+", help="values of N")
    parser.add_argument("--providers", nargs="+", choices=PEERS, help="default: all")
    parser.add_argument("--out", type=Path, help="folder for the .md and .json; default: print only")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("no CUDA device: the figures of this benchmark are GPU figures; use --tiny to rehearse")

    with tempfile.TemporaryDirectory() as folder:  # a group of one, which Megatron's and TE's losses ask for
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        info, ceiling = machine(device), ceilings(device, args.tiny)
        print(json.dumps(info), json.dumps(ceiling), sep="\n", flush=True)
        cells, tables = run_all(args, device, ceiling)
        dist.destroy_process_group()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / ("logprob-sweep" if args.sweep else "logprob" if not args.tiny else "logprob-rehearsal")
        head = "\n".join(f"- {key}: {value}" for key, value in {**info, **ceiling}.items())
        stem.with_suffix(".md").write_text(f"{head}\n\n" + "\n".join(tables))
        stem.with_suffix(".json").write_text(
            json.dumps({"machine": info, "ceilings": ceiling, "cells": cells}, indent=1)
        )


def run_all(args, device, ceiling) -> tuple[list[dict], list[str]]:
    models, all_tokens = (TINY_MODELS, TINY_TOKENS) if args.tiny else (MODELS, TOKENS)
    if args.sweep and not args.tokens:
        all_tokens = all_tokens[1:2]
    cells, tables = [], []
    for model, (hidden, vocab) in models.items():
        for setting, products in SETTINGS.items():
            columns = {name: (PEERS[name], {}) for name in args.providers or PEERS}
            if args.sweep:
                columns = {
                    f"{block} × {tile}": (PEERS["ours"], {"block_tokens": block, "tile_vocab": min(tile, vocab)})
                    for block, tile in SWEEP[setting]
                }
            rows = {}
            for n in args.tokens or all_tokens:
                floor_ms = products * 2 * n * hidden * vocab / ceiling["matrix_tflops"] / 1e9
                rows[f"{n:,}"] = row = {"floor": f"{floor_ms:.2f} ms"}
                for column, (make, options) in columns.items():
                    cell = measure(make, setting, n, hidden, vocab, device, options)
                    row[column] = text(cell, None if args.tiny else floor_ms)
                    cells.append({"model": model, "setting": setting, "n": n, "provider": column, **cell})
            tables.append(report(f"{model}: H = {hidden}, V = {vocab:,}, {setting}", "N", rows))
            print(tables[-1], flush=True)
    return cells, tables


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
