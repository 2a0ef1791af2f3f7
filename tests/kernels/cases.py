"""Inputs and error measures that the kernel tests share. N tokens, H hidden, V vocabulary rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_bvpo.kernels import target_logps
from megatron_bvpo.kernels.reference import reference_grads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    upstream_N: torch.Tensor
    vocab_size: int | None = None


def random_case(n, h, v, dtype=torch.float32, *, spread=4.0, ignored=0.2, padding=0, seed=0, device=DEVICE) -> Case:
    """Logits of about N(0, spread), some targets ignored, `padding` rows of large weights past the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g)
    weight = torch.randn(v + padding, h, generator=g) * (spread / h**0.5)
    weight[v:] *= 10  # padding that counted would be seen
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    upstream = torch.randn(n, generator=g)
    return case_on(device, dtype, hidden, weight, targets, upstream, v if padding else None)


def case_on(device, dtype, hidden_NH, weight_VH, targets_N, upstream_N, vocab_size=None) -> Case:
    """Values are drawn on the CPU, so that they are the same on every device."""
    hidden_NH, weight_VH = hidden_NH.to(device, dtype), weight_VH.to(device, dtype)
    return Case(hidden_NH, weight_VH, targets_N.to(device), upstream_N.to(device), vocab_size)


def run(case: Case, *, frozen=True, **options):
    """(logps, d hidden, d weight or None) of target_logps."""
    hidden = case.hidden_NH.detach().clone().requires_grad_()
    weight = case.weight_VH.detach().clone().requires_grad_(not frozen)
    logps = target_logps(hidden, weight, case.targets_N, vocab_size=case.vocab_size, **options)
    logps.backward(case.upstream_N.to(logps.dtype))
    return logps.detach(), hidden.grad, weight.grad


def expected(case: Case):
    return reference_grads(case.hidden_NH, case.weight_VH, case.targets_N, case.upstream_N, vocab_size=case.vocab_size)


def plain_torch(case: Case):
    """What one writes without a kernel: logits in the input dtype, cross-entropy in float32."""
    hidden = case.hidden_NH.detach().clone().requires_grad_()
    weight = case.weight_VH.detach().clone().requires_grad_()
    logits = hidden @ weight[: case.vocab_size].T
    logps = -F.cross_entropy(logits.float(), case.targets_N, reduction="none", ignore_index=-100)
    logps.backward(case.upstream_N)
    return logps.detach(), hidden.grad, weight.grad


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth|, or |value| where the truth is 0; NaN stays NaN and fails every bound."""
    error, size = (value.double() - truth).norm().item(), truth.norm().item()
    return error / size if size > 0 else error


def relative_per_token(value_NH: torch.Tensor, truth_NH: torch.Tensor) -> torch.Tensor:
    return (value_NH.double() - truth_NH).norm(dim=1) / truth_NH.norm(dim=1)
