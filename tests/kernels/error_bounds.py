"""How far from float64 a result may be, on whatever machine runs the test.

Another x86-64 adds in another order, with or without fused multiply-adds, so a number that one machine gave bounds
nothing on the next. Here an error is counted in units of what these inputs make of one rounding (`in_units`), and
may be FACTOR times as many of them as a trusted computation of the same inputs needs, here and now, in the worst of
ORDERS orders of its sums (`allowed`). The unit takes the conditioning out, a logit of 500 or of 5, so that the many
tokens and orders measure one number, and none has to be lucky.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .cases import Case, expected

ORDERS = 8
FACTOR = 3.0  # two for sums in yet another order, and half as much again for products that are rounded too (no FMA)
EPS = torch.finfo(torch.float32).eps  # logits, sums and logps are float32 whatever the inputs are


def units(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one rounding in every logit, and one of the result, can change in (logps_N, d hidden_NH, d weight_VH).

    A rounding of the largest x·W costs δ = eps Σ|x W|. A logp moves by Σ_{v≠t} p_v (δ_t - δ_v), the gradient of a
    logit by as large a part of itself as δ is, and the two products carry that on by their absolute values.
    """
    x_NH, w_VH = case.hidden_NH.double(), case.weight_VH[: case.vocab_size].double()
    logps_N, grad_x_NH, grad_w_VH = expected(case)
    kept_N = case.targets_N != -100
    targets_N1 = case.targets_N.where(kept_N, 0)[:, None]
    delta_N = EPS * (1 + (x_NH.abs() @ w_VH.abs().T).amax(1))
    p_NV = (x_NH @ w_VH.T).softmax(1)
    rest_N1 = p_NV.scatter(1, targets_N1, 0.0).sum(1, keepdim=True)  # 1 - p, without the cancellation
    grad_NV = p_NV.scatter(1, targets_N1, rest_N1) * (case.upstream_N.double() * kept_N * delta_N).abs()[:, None]
    result_eps = torch.finfo(case.hidden_NH.dtype).eps
    unit_w_VH = result_eps * grad_w_VH.abs()
    unit_w_VH[: case.vocab_size] += grad_NV.T @ x_NH.abs()
    unit_x_NH = grad_NV @ w_VH.abs() + result_eps * grad_x_NH.abs()
    return (2 * rest_N1[:, 0] * delta_N + EPS * logps_N.abs()) * kept_N, unit_x_NH, unit_w_VH


def in_units(case: Case, results) -> list[float]:
    """Errors of (logps_N, d hidden_NH, d weight_VH or None) against float64, each of its worst token or vocabulary row.

    Where the unit is 0 (ignored tokens, padding) any error is infinite; NaN counts as infinite too.
    """
    found = []
    for value, truth, unit in zip(results, expected(case), units(case), strict=True):
        if value is None:
            continue
        width = truth[0].numel() if truth.dim() > 1 else 1
        error, unit = ((value.double() - truth).view(-1, width).norm(dim=1), unit.view(-1, width).norm(dim=1))
        counted = torch.where(error == 0, 0.0, error / unit).nan_to_num(nan=torch.inf, posinf=torch.inf)
        found.append(counted.max().item())
    return found


def allowed(case: Case, compute: Callable[[Case], tuple]) -> list[float]:
    """FACTOR times the most units that `compute(case)` is off by, for each of its results, over ORDERS orders."""
    orders = [in_units(case, in_another_order(case, compute, seed)) for seed in range(ORDERS)]
    return [FACTOR * max(errors) for errors in zip(*orders, strict=True)]


def in_another_order(case: Case, compute: Callable[[Case], tuple], seed: int) -> tuple:
    """`compute` with tokens, hidden units and vocabulary shuffled, its results put back in order."""
    g = torch.Generator().manual_seed(seed)
    (n, h), v = case.hidden_NH.shape, case.weight_VH.shape[0]
    real = v if case.vocab_size is None else case.vocab_size
    tokens, hidden = torch.randperm(n, generator=g), torch.randperm(h, generator=g)
    vocab = torch.cat([torch.randperm(real, generator=g), torch.arange(real, v)])
    tokens, hidden, vocab = (order.to(case.hidden_NH.device) for order in (tokens, hidden, vocab))
    targets_N = case.targets_N[tokens]
    shuffled = replace(
        case,
        hidden_NH=case.hidden_NH[tokens][:, hidden].contiguous(),
        weight_VH=case.weight_VH[vocab][:, hidden].contiguous(),
        targets_N=torch.where(targets_N == -100, -100, vocab.argsort()[targets_N.clamp(min=0)]),
        upstream_N=case.upstream_N[tokens],
    )
    logps_N, grad_x_NH, grad_w_VH = compute(shuffled)
    tokens, hidden, vocab = tokens.argsort(), hidden.argsort(), vocab.argsort()
    grad_w_VH = None if grad_w_VH is None else grad_w_VH[vocab][:, hidden]
    return logps_N[tokens], grad_x_NH[tokens][:, hidden], grad_w_VH
