"""Optimal transport between two layers: which head, neuron or expert of the one is which of the other.

All matrices of likeness are [of the lower layer, of the upper layer], all plans likewise with columns that sum to 1, so
that planᵀ @ rows are the lower layer's rows in the upper layer's order. A plan of POT's sums to 1 as a whole: used as
it is (as in the public code), it makes of n rows ones of 1/n of their size.

Likeness is a sum of cosines, and what is far is told for each unit by its own measure: of distances scaled as one, a
single loud unit (or a single pair that is one) makes all others alike, and the plan of these their mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_bvpo.errors import UserError

# Of the entropy, against costs in [0, 1]: 0 is the most alike, 1 as far as the mean, or farther. Without the scale,
# rows of thousands of numbers are all about as far from each other, and the plan makes all neurons one.
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


def plan(alike: Tensor) -> Tensor:
    """Sinkhorn's plan for likenesses [n, m], its columns scaled to sum to 1. Takes 5 · n · m floats of `alike`'s type.

    Args:
        alike: the more, the more alike; costs are made of it in place.
    """
    import ot

    cost = alike.neg_()
    cost -= cost.min(0).values
    cost /= cost.mean(0).clamp_(min=torch.finfo(cost.dtype).tiny)
    cost.clamp_(max=1)  # or exp(-cost / regularisation) could be 0 for a whole row
    n, m = cost.shape
    a, b = (cost.new_full((k,), 1 / k) for k in (n, m))
    found = ot.sinkhorn(a, b, cost, REGULARISATION, stopThr=TOLERANCE / math.sqrt(m), warn=False)
    return found.div_(found.sum(0))


def permutation(alike: Tensor) -> Tensor:
    """For each column of likenesses [n, n] the row to put in its place, each row once: Sinkhorn's plan, rounded."""
    from scipy.optimize import linear_sum_assignment

    columns, rows = linear_sum_assignment(plan(alike).T.double().numpy(), maximize=True)
    return torch.from_numpy(rows[columns.argsort()])


def cosines(lower: Tensor, upper: Tensor, into: Tensor | None = None) -> Tensor:
    """Of rows [n, d] and [m, d], which are scaled to length 1 in place: [n, m], added to `into`; of zeros 0."""
    for rows in (lower, upper):
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
    found = lower.new_zeros(len(lower), len(upper)) if into is None else into
    return found.addmm_(lower, upper.T)


def neuron_plan(parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Of MLP neurons: by what they read (rows of gate and up) and write (columns of down), each part [n, d] of both."""
    alike = None
    for lower, upper in parts:
        alike = cosines(lower, upper, alike)
        del lower, upper  # before the next are read
    return plan(alike)


def head_plan(query_alike: Tensor, kv_alike: Tensor) -> tuple[Tensor, Tensor]:
    """(plan of query heads, plan of key-value heads): whole heads, and query heads with their group.

    Nothing moves within a head, so that RoPE's pairs stay pairs. A query head goes where its key-value head goes, and
    within its group to its own likeness.

    Args:
        query_alike: [heads, heads], of query rows and of output columns.
        kv_alike: [kv_heads, kv_heads], of key and value rows.
    """
    from scipy.optimize import linear_sum_assignment

    groups = len(kv_alike)
    of_group = len(query_alike) // groups
    blocks = query_alike.view(groups, of_group, groups, of_group).transpose(1, 2)  # [g, g', r, r]
    alike = kv_alike.clone()
    for g in range(groups):
        for h in range(groups):
            rows, columns = linear_sum_assignment(blocks[g, h].double().numpy(), maximize=True)
            alike[g, h] += blocks[g, h][torch.from_numpy(rows), torch.from_numpy(columns)].sum()
    of_kv = plan(alike)
    of_queries = torch.empty_like(blocks)
    for g in range(groups):
        for h in range(groups):
            of_queries[g, h] = plan(blocks[g, h].clone()) * of_kv[g, h]
    return of_queries.transpose(1, 2).reshape(query_alike.shape), of_kv


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
    return permutation(cosines(lower_router.clone(), upper_router.clone(), cosines(lower_answers, upper_answers)))
