"""How many tokens and vocabulary rows one tile of logits holds.

CPU sizes were timed on two Xeon cores with H = 64, V = 151,936. The CUDA sizes follow from the arithmetic in
the comments; on an H200 the fused path was timed with them, others were not (`benchmarks/gpu.sh --only tiles`).
"""

from __future__ import annotations

import torch

GIB = 2**30
CUDA_BUDGET = GIB  # logits in float32 and their exponentials in bf16
CUDA_NO_GRAD_BLOCK = 1024  # with 8448 rows: 2 waves of 128 x 256 output tiles on 132 multiprocessors, and the
CUDA_NO_GRAD_TILE = 8448  # float32 tile (33 MiB) is read again while it is still in the L2 cache (50 MB)
CUDA_FUSED_BLOCK = 16_384  # no grad: nothing is stored but a sum per output tile, 39 MB at V = 151,936
CUDA_BACKWARD_BLOCK = 8192  # few passes over the float32 dX, which every vocabulary tile adds to
CPU_BLOCK = 512  # 4 MiB of logits: the element-wise passes stay in the core's cache
CPU_TILE = 2048


def choose_tiles(
    device: torch.device,
    tokens: int,
    rows: int,
    *,
    with_products: bool,
    fused: bool = False,
    block_tokens: int | None = None,
    tile_vocab: int | None = None,
    budget_bytes: int | None = None,
) -> dict[str, int]:
    """The four sizes of a `Plan`. `block_tokens` and `tile_vocab`, where given, hold for both directions.

    `budget_bytes` (CUDA) is what a tile of logits may take, by default CUDA_BUDGET; what is free plays no part, so that
    two runs are bit-identical.
    """
    for name, value in (("block_tokens", block_tokens), ("tile_vocab", tile_vocab)):
        if value is not None and value < 1:
            raise ValueError(f"target_logps: {name} is {value}, expected at least 1")
    if budget_bytes is not None and budget_bytes < 1:
        raise ValueError(f"target_logps: budget_bytes is {budget_bytes}, expected at least 1")
    if device.type == "cuda":
        sizes = cuda_tiles(budget_bytes or CUDA_BUDGET, tokens, rows, with_products=with_products, fused=fused)
    else:
        sizes = (CPU_BLOCK, CPU_TILE, CPU_BLOCK, CPU_TILE)
    forward_block, forward_tile, backward_block, backward_tile = sizes
    return dict(
        block_tokens=block_tokens or forward_block,
        tile_vocab=tile_vocab or forward_tile,
        backward_block_tokens=block_tokens or backward_block,
        backward_tile_vocab=tile_vocab or backward_tile,
    )


def cuda_tiles(
    budget: int, tokens: int, rows: int, *, with_products: bool, fused: bool = False
) -> tuple[int, int, int, int]:
    """(forward tokens, forward rows, backward tokens, backward rows) within `budget` bytes of logits.

    Powers of two of tokens: with H = 4096 the second product of 1024 tokens is 128 output tiles of 128 x 256,
    one wave on 132 multiprocessors, where 1152 tokens would be 144 tiles and a second wave nearly empty.
    """
    bytes_per_logit = 6  # float32 and bf16; float32 tiles are overwritten in place. The backward pass is never fused
    backward_block = min(CUDA_BACKWARD_BLOCK, power_of_two_below(max(tokens, 128)) * 2)
    backward_tile = power_of_two_below(max(budget // (2 * bytes_per_logit * backward_block), 512))
    if not with_products and fused:
        return CUDA_FUSED_BLOCK, max(rows, 1), backward_block, backward_tile
    if not with_products:
        block = min(CUDA_NO_GRAD_BLOCK, power_of_two_below(max(budget // (4 * CUDA_NO_GRAD_TILE), 128)))
        return block, CUDA_NO_GRAD_TILE, backward_block, backward_tile
    bytes_per_logit = 2 if fused else bytes_per_logit  # bf16 exponentials alone
    # A whole row of logits at once, so that products are written once and not added to.
    affordable = budget // (bytes_per_logit * max(rows, 1))
    block = min(max(power_of_two_below(max(affordable, 1)), 128), 8192)
    tile = min(max(rows, 1), max(budget // (bytes_per_logit * block), 512))
    return block, tile, backward_block, backward_tile


def power_of_two_below(value: int) -> int:
    """The largest power of two that is at most `value` (at least 1)."""
    return 1 << (value.bit_length() - 1)
