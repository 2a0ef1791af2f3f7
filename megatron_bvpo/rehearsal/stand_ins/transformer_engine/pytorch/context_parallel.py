"""The zigzag layout of context parallelism, and gathering K and V in it.

A sequence of length L (a multiple of 2n) on n ranks is cut in 2n chunks; rank r holds chunks r and 2n-1-r, in
that order, so that causal work is even. Packed sequences are cut one by one, each rank holding its share of
the first sequence, then of the second, and so on.
"""

from __future__ import annotations

import torch

from . import collectives


def zigzag_positions(length: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Positions in a sequence of `length` tokens that rank `cp_rank` holds, in its order: [length / cp_size].

    Raises:
        ValueError: `length` is no multiple of 2 * cp_size.
    """
    if cp_size == 1:
        return torch.arange(length)
    if length % (2 * cp_size):
        raise ValueError(
            f"a sequence of {length} tokens cannot be cut in {2 * cp_size} equal chunks for context "
            f"parallelism over {cp_size} ranks: pad every sequence to a multiple of {2 * cp_size}."
        )
    chunk = length // (2 * cp_size)
    first, second = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))


def packed_positions(lengths: list[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Indices into the whole pack that rank `cp_rank` holds, in its order: [sum(lengths) / cp_size]."""
    parts, start = [], 0
    for length in lengths:
        parts.append(start + zigzag_positions(length, cp_size, cp_rank))
        start += length
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def gather_sequence(x: torch.Tensor, lengths: list[int], group) -> torch.Tensor:
    """Each rank's [sum(lengths) / n, ...] -> the whole [sum(lengths), ...] in sequence order, on every rank.

    Backward sums the ranks' gradients and gives each its own part.
    """
    ranks = collectives.world_size(group)
    if ranks == 1:
        return x
    gathered = collectives.all_gather(x, group)
    held = torch.cat([packed_positions(lengths, ranks, rank) for rank in range(ranks)]).to(x.device)
    order = torch.empty_like(held)
    order[held] = torch.arange(len(held), device=x.device)
    return gathered.index_select(0, order)
