"""Figures of one process on one device: products, copies, and cells of the log-prob table.

A cell is one provider at one setting and size: median, 10th and 90th percentile of its times, the most memory it held
beyond its inputs (gradients included), and its errors against float64 on the first tokens: the largest of a logp, the
median relative one of a token's dX.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time

import torch

from benchmarks.gpu import peers
from megatron_bvpo.kernels.reference import reference_logps

CHECKED_TOKENS = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(call, *, least: int = 5, most: int = 40, seconds: float = 0.8) -> dict:
    """Milliseconds of `call`: CUDA events around each run, the L2 cache overwritten before it.

    At least `least` runs after two to warm up, and as many as fit in `seconds`, up to `most`. On a CPU wall time.
    """
    if DEVICE.type == "cpu":
        least, most, seconds = 2, 3, 0.2
    for _ in range(2):
        call()
    cache = torch.empty(2**28, dtype=torch.uint8, device=DEVICE) if DEVICE.type == "cuda" else None  # 5 times the L2
    times, start = [], time.monotonic()
    while len(times) < least or (len(times) < most and time.monotonic() - start < seconds):
        times.append(one_run(call, cache))
    times.sort()
    at = lambda share: times[round(share * (len(times) - 1))]  # noqa: E731
    return {"ms": statistics.median(times), "ms_p10": at(0.1), "ms_p90": at(0.9), "runs": len(times)}


def one_run(call, cache) -> float:
    if cache is None:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def product_rate(m: int, k: int, n: int, out: str, transposed: bool) -> dict:
    """[m, k] · [k, n] of random bf16 factors, the second stored as [n, k] if `transposed`: as the log-probs call it."""
    free()
    a = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(*((n, k) if transposed else (k, n)), device=DEVICE, dtype=torch.bfloat16)
    b = b.T if transposed else b
    # A CPU has no product of bf16 factors with a float32 result.
    wide = {"out_dtype": torch.float32} if out == "fp32" and DEVICE.type == "cuda" else {}
    result = torch.empty(m, n, device=DEVICE, dtype=torch.float32 if wide else torch.bfloat16)
    found = timed(lambda: torch.mm(a, b, out=result, **wide))
    return {**found, "tflops": 2 * m * n * k / found["ms"] / 1e9}


def copy_rate(count: int) -> dict:
    """TB/s of a copy of `count` bytes, read and written."""
    free()
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source))
    return {**found, "tbs": 2 * count / found["ms"] / 1e9}


def measure(peer: str, setting: str, n: int, hidden: int, vocab: int, tiles: dict) -> dict:
    """One cell. Raises what the provider raises; `peers.Unavailable` where it is not installed."""
    free()
    logps_of = getattr(peers, peer)(**tiles)
    x, weight, targets, upstream = inputs(n, hidden, vocab)
    x.requires_grad_(setting != "no grad")
    weight.requires_grad_(setting == "trainable")

    def call():
        x.grad = weight.grad = None
        with torch.set_grad_enabled(setting != "no grad"):
            logps = logps_of(x, weight, targets)
        if setting != "no grad":
            # A provider with a reduced loss has no upstream gradient per token.
            logps.backward(upstream if logps.dim() else None)
        return logps.detach()

    logps = call()
    cell = errors(logps, x.grad, *truth(n, hidden, vocab)) | {"per_token": logps.dim() > 0}
    x.grad = weight.grad = logps = None
    truth.cache_clear()
    return cell | {"gib": peak_gib(call)} | timed(call)


def inputs(n: int, hidden: int, vocab: int):
    """Random data with targets likely enough (p from 1e-4 to near 1) for errors in dX to mean something."""
    g = torch.Generator(DEVICE).manual_seed(n)
    weight = torch.randn(vocab, hidden, generator=g, device=DEVICE) / hidden**0.5 * 2
    targets = torch.randint(0, vocab, (n,), generator=g, device=DEVICE)
    x = torch.randn(n, hidden, generator=g, device=DEVICE)
    x += torch.linspace(0, 8, n, device=DEVICE)[torch.randperm(n, generator=g, device=DEVICE), None] * weight[targets]
    upstream = torch.randn(n, generator=g, device=DEVICE)
    return x.bfloat16(), weight.bfloat16(), targets, upstream


@functools.lru_cache(maxsize=1)
def truth(n: int, hidden: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, dX) of the first tokens in float64, on the device."""
    x, weight, targets, upstream = inputs(n, hidden, vocab)
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


def peak_gib(call) -> float | None:
    """Most memory that the call held beyond what was there before; None on a CPU, which does not say."""
    if DEVICE.type != "cuda":
        return None
    free()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
