"""Optimal transport between two layers: which head, neuron or expert of the one is which of the other.

All cost matrices are [of the lower layer, of the upper layer], all plans likewise with columns that sum to 1, so that
planᵀ @ rows are the lower layer's rows in the upper layer's order. A plan of POT's sums to 1 as a whole: used as it
is (as in the public code), it makes of n rows ones of 1/n of their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_bvpo.errors import UserError

# Of the entropy, against costs that are moved and scaled to [0, 1]. A move changes no plan; without the scale, rows of
# thousands of numbers are all about as far from each other, and the plan of two trained layers makes all neurons one.
REGULARISATION = 0.06
# POT stops where the marginals are off by this share of their size, or after its 1000 iterations: columns are made to
# sum to 1 all the same.
TOLERANCE = 1e-3
# Fixed inputs on which experts are compared.
PROBES = 16


def require_pot() -> None:
    """Raises UserError where the package POT is not installed."""
    try:
        import ot  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"growing a model needs the package POT ({e})",
            remedy="pip install POT, or 'megatron-bvpo[rehearsal]', which has it",
        ) from None


def plan(cost: Tensor) -> Tensor:
    """Sinkhorn's plan for distances [n, m], its columns scaled to sum to 1. Takes 5 · n · m floats of `cost`'s type.

    Args:
        cost: distances; moved and scaled to [0, 1] in place.
    """
    import ot

    cost -= cost.min()
    if (largest := cost.max()) > 0:
        cost /= largest
    n, m = cost.shape
    a, b = (cost.new_full((k,), 1 / k) for k in (n, m))
    found = ot.sinkhorn(a, b, cost, REGULARISATION, stopThr=TOLERANCE / math.sqrt(m), warn=False)
    return found.div_(found.sum(0))


def permutation(cost: Tensor) -> Tensor:
    """For each column of distances [n, n] the row that is put in its place, each row once: Sinkhorn's plan, rounded."""
    from scipy.optimize import linear_sum_assignment

    columns, rows = linear_sum_assignment(plan(cost).T.double().numpy(), maximize=True)
    return torch.from_numpy(rows[columns.argsort()])


def squared_distances(lower: Tensor, upper: Tensor, into: Tensor | None = None) -> Tensor:
    """‖lower_i − upper_j‖² of rows [n, d] and [m, d] as [n, m], added to `into`."""
    found = lower.new_zeros(len(lower), len(upper)) if into is None else into
    found.addmm_(lower, upper.T, alpha=-2)
    found += _square_norms(lower)[:, None]
    found += _square_norms(upper)
    return found


def _square_norms(rows: Tensor) -> Tensor:
    """Without a second matrix of squares."""
    return torch.linalg.vector_norm(rows, dim=1).square_()


def distances(squared: Tensor) -> Tensor:
    """Their roots, in place; what rounding left below 0 is 0."""
    return squared.clamp_(min=0).sqrt_()


def neuron_plan(parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Of MLP neurons: by what they read (rows of gate and up) and write (columns of down), each part [n, d] of both."""
    squared = None
    for lower, upper in parts:
        squared = squared_distances(lower, upper, squared)
        del lower, upper  # before the next are read
    return plan(distances(squared))


def head_plan(query_squared: Tensor, kv_squared: Tensor) -> tuple[Tensor, Tensor]:
    """(plan of query heads, plan of key-value heads): whole heads, and query heads with their group.

    Nothing moves within a head, so that RoPE's pairs stay pairs. A query head goes where its key-value head goes, and
    within its group to its own likeness.

    Args:
        query_squared: [heads, heads], of query rows and of output columns.
        kv_squared: [kv_heads, kv_heads], of key and value rows.
    """
    from scipy.optimize import linear_sum_assignment

    groups = len(kv_squared)
    of_group = len(query_squared) // groups
    blocks = query_squared.view(groups, of_group, groups, of_group).transpose(1, 2)  # [g, g', r, r]
    cost = kv_squared.clone()
    for g in range(groups):
        for h in range(groups):
            rows, columns = linear_sum_assignment(blocks[g, h].double().numpy())
            cost[g, h] += blocks[g, h][torch.from_numpy(rows), torch.from_numpy(columns)].sum()
    of_kv = plan(distances(cost))
    of_queries = torch.empty_like(blocks)
    for g in range(groups):
        for h in range(groups):
            of_queries[g, h] = plan(distances(blocks[g, h].clone())) * of_kv[g, h]
    return of_queries.transpose(1, 2).reshape(query_squared.shape), of_kv


def transported(found: Tensor, lower: Tensor) -> Tensor:
    """planᵀ @ units: whole units of `lower` (its first dimension cut into as many as the plan has rows)."""
    units = lower.reshape(len(found), -1)
    return (found.T @ units).reshape(lower.shape)


def answers(experts: Iterator[tuple[Tensor, Tensor, Tensor]], norm_H: Tensor) -> Tensor:
    """What each expert answers to the same PROBES inputs: [E, PROBES · H].

    Of weights, only an order of neurons differs where one expert is another with its neurons shuffled; what it answers
    does not.

    Args:
        experts: (gate [n, H], up [n, H], down [H, n]) one after the other.
        norm_H: scale of the norm in front of them.
    """
    generator = torch.Generator().manual_seed(0)
    x_PH = torch.randn(PROBES, len(norm_H), generator=generator) * norm_H
    found = []
    for gate, up, down in experts:
        inner = torch.nn.functional.silu(x_PH @ gate.T) * (x_PH @ up.T)
        found.append((inner @ down.T).flatten())
        del gate, up, down
    return torch.stack(found)


def expert_permutation(
    lower_answers: Tensor, upper_answers: Tensor, lower_router: Tensor, upper_router: Tensor
) -> Tensor:
    """For each expert of the upper layer, the lower layer's that is most like it, each once.

    By what they answer and by what they are chosen for (rows of the router), both with the same weight.
    """
    cost = 0
    for lower, upper in ((lower_answers, upper_answers), (lower_router, upper_router)):
        squared = squared_distances(lower, upper).clamp_(min=0)
        cost = cost + squared / squared.mean().clamp(min=torch.finfo(squared.dtype).tiny)
    return permutation(distances(cost))
