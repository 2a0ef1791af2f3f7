"""One forward and one backward of the target log-probs; the mathematics is MATH.md §4.

Per token, with logits divided by the temperature T: anchor a = l_t, u_v = (l_v - a)/T, s = Σ_{v≠t} exp(u_v) over all
ranks, e_t = exp(u_t) = 1, and

    logp        = u_t - log1p((e_t - 1) + s)                            (= -log1p(s) at this anchor)
    dlogp/dx    = -(Σ_{v≠t} exp(u_v) W_v - s W_t) / (T (e_t + s))
    entropy     = log(e_t + s) - (e_t u_t + Σ_{v≠t} exp(u_v) u_v) / (e_t + s)      no gradient

The forward pass, in phases:

    1 targets   drop ignored tokens (a device synchronisation), l_t everywhere              one all-reduce
    2 blocks    per block of tokens: logits, s, and with a frozen head Σ exp(l_v - a) W_v
    3 ranks     s over the ranks                                                            one all-reduce
    4 finish    logp; with a frozen head dlogp/dx, which is kept in place of the hidden states
    5 overflow  tokens with logp below about -80 go through 2 to 4 again, anchored at their row's maximum
    6 reduce    dlogp/dx over the ranks                                 one all-reduce or reduce-scatter

With a frozen head the backward pass is upstream · dlogp/dx and communicates nothing. With a trainable head
dW needs the upstream gradient before its product, so the backward pass recomputes tile by tile.
The number and the shapes of the collectives depend on the targets alone, never on a rank's tile sizes.

Shapes: N tokens of the sequence, L tokens of this rank (N, or N / ranks under sequence parallelism), M
tokens that are not ignored, n of one block, B of those to do again, H hidden, V this rank's vocabulary rows
with padding, R without, v of a tile.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron_bvpo.kernels.tensor_parallel import TensorParallel
from megatron_bvpo.kernels.torch_logprob import accumulate_dtype, add_product, row_max, tiles

# Sums up to e^80 (logp -80) keep e^a's products with the weights inside float32 (its limit is e^88.7).
OVERFLOW = 5.5e34


@dataclass(frozen=True)
class Plan:
    """What `target_logps` decided: constants of one call, the same on every rank except `first_row`, `rows`
    and the tile sizes."""

    passes: ModuleType  # torch_logprob, triton_logprob or fused_logprob
    tp: TensorParallel
    first_row: int  # vocabulary id of weight_VH[0]
    rows: int  # R, rows of weight_VH that are no padding
    ignore_index: int
    temperature: float
    entropy: bool
    block_tokens: int
    tile_vocab: int
    backward_block_tokens: int
    backward_tile_vocab: int


@dataclass
class Tokens:
    """The tokens that take part, and the sums that the forward pass found for them."""

    kept_M: torch.Tensor  # their positions in the sequence, int64
    local_M: torch.Tensor  # target as a row of this rank's shard; out of [0, R) where another rank owns it
    logit_M: torch.Tensor  # l_t
    anchor_M: torch.Tensor
    s_M: torch.Tensor
    moment_M: torch.Tensor  # Σ_{v≠t} exp(u_v) u_v, where entropies are asked for

    def blocks(self, size: int) -> list[slice]:
        count = self.kept_M.shape[0]
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def rows_of(self, x_NH: torch.Tensor, block: slice) -> torch.Tensor:
        """The block's rows; a view where every token of the sequence takes part."""
        whole = self.kept_M.shape[0] == x_NH.shape[0]
        return x_NH[block] if whole else x_NH.index_select(0, self.kept_M[block])

    def subset(self, index: torch.Tensor) -> Tokens:
        return Tokens(*(x.index_select(0, index) for x in vars(self).values()))

    def scaled_target_M(self, temperature: float) -> torch.Tensor:
        """u_t"""
        return (self.logit_M - self.anchor_M) / temperature

    def total_M(self, temperature: float) -> torch.Tensor:
        """e_t + s"""
        return torch.exp(self.scaled_target_M(temperature)) + self.s_M

    def logps_M(self, temperature: float) -> torch.Tensor:
        scaled_M = self.scaled_target_M(temperature)
        return scaled_M - torch.log1p(torch.exp(scaled_M) - 1 + self.s_M)

    def entropies_M(self, temperature: float) -> torch.Tensor:
        scaled_M = self.scaled_target_M(temperature)
        exp_M = torch.exp(scaled_M)
        entropies_M = torch.log1p(exp_M - 1 + self.s_M) - (exp_M * scaled_M + self.moment_M) / (exp_M + self.s_M)
        return entropies_M.clamp(min=0)  # the difference of two numbers that may be near each other


class TargetLogps(torch.autograd.Function):
    """(hidden_LH, weight_VH, targets_N, plan) → (logps_N, entropies_N), for `target_logps`, which validates."""

    @staticmethod
    def forward(ctx, hidden_LH, weight_VH, targets_N, plan: Plan):
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        frozen = needs_hidden and not needs_weight
        with on_device_of(hidden_LH), torch.autocast(hidden_LH.device.type, enabled=False):
            x_NH = plan.tp.gather_tokens(hidden_LH)
            weight_RH = weight_VH[: plan.rows]
            tokens = find_targets(x_NH, weight_RH, targets_N, plan)
            unscaled_NH = gradient_buffer(x_NH, tokens, plan) if frozen else None
            accumulate(x_NH, weight_RH, tokens, plan, unscaled_NH)
            redo_overflowed(x_NH, weight_RH, tokens, plan, unscaled_NH)
            logps_N = tokens.s_M.new_zeros(targets_N.shape)
            logps_N.index_copy_(0, tokens.kept_M, tokens.logps_M(plan.temperature))
            entropies_N = torch.zeros_like(logps_N)
            if plan.entropy:
                entropies_N.index_copy_(0, tokens.kept_M, tokens.entropies_M(plan.temperature))
            ctx.mark_non_differentiable(entropies_N)
            if frozen:
                ctx.save_for_backward(plan.tp.sum_tokens(unscaled_NH).to(hidden_LH.dtype), targets_N)
            elif needs_weight:
                ctx.save_for_backward(hidden_LH, weight_VH, *vars(tokens).values())
            ctx.plan, ctx.frozen = plan, frozen
        return logps_N, entropies_N

    @staticmethod
    def backward(ctx, upstream_N, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "target_logps: double backward is not supported (this backward pass was called with "
                "create_graph=True); call it with create_graph=False, or take second derivatives of "
                "kernels.reference"
            )
        plan = ctx.plan
        with on_device_of(upstream_N), torch.autocast(upstream_N.device.type, enabled=False):
            if ctx.frozen:
                unscaled_LH, targets_N = ctx.saved_tensors
                upstream_N = upstream_N.masked_fill(targets_N == plan.ignore_index, 0)
                grad_LH = torch.empty_like(unscaled_LH)
                torch.mul(unscaled_LH, plan.tp.own_tokens(upstream_N)[:, None], out=grad_LH)
                return grad_LH, None, None, None
            hidden_LH, weight_VH, *tokens = ctx.saved_tensors
            grads = recompute_grads(
                hidden_LH, weight_VH, Tokens(*tokens), upstream_N, plan, needs_hidden=ctx.needs_input_grad[0]
            )
            return *grads, None, None


def on_device_of(x: torch.Tensor):
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def find_targets(x_NH, weight_RH, targets_N, plan: Plan) -> Tokens:
    """Phase 1: the tokens that are not ignored, with l_t from the rank that owns the target."""
    kept_M = (targets_N != plan.ignore_index).nonzero().squeeze(1)
    local_M = targets_N.index_select(0, kept_M).long() - plan.first_row
    logit_M = torch.empty(kept_M.shape, dtype=accumulate_dtype(x_NH.dtype), device=x_NH.device)
    sums = dict(s_M=torch.empty_like(logit_M), moment_M=torch.zeros_like(logit_M))
    tokens = Tokens(kept_M, local_M, logit_M, anchor_M=logit_M, **sums)
    for block in tokens.blocks(plan.block_tokens):
        logit_M[block] = plan.passes.target_logits(tokens.rows_of(x_NH, block), weight_RH, local_M[block])
    if kept_M.numel():
        plan.tp.sum_(logit_M)
    return tokens


def gradient_buffer(x_NH, tokens: Tokens, plan: Plan) -> torch.Tensor:
    """Where dlogp/dx goes, zero for ignored tokens. [N, H]

    In the dtype of the hidden states on one rank. With several it holds partial sums, first unscaled (s is
    not known before phase 3) and then to be added up: both in float32, rounded once at the end.
    """
    dtype = x_NH.dtype if plan.tp.size == 1 else tokens.s_M.dtype
    whole = tokens.kept_M.shape[0] == x_NH.shape[0]
    return (torch.empty if whole else torch.zeros)(x_NH.shape, dtype=dtype, device=x_NH.device)


def accumulate(x_NH, weight_RH, tokens: Tokens, plan: Plan, unscaled_NH) -> None:
    """Phases 2 to 4: fills tokens.s_M, and the tokens' rows of unscaled_NH unless that is None."""
    blocks = tokens.blocks(plan.block_tokens)
    several = plan.tp.size > 1
    for block in blocks:
        tokens.s_M[block], moment_n, products_nH = plan.passes.sum_exp(
            tokens.rows_of(x_NH, block),
            weight_RH,
            tokens.local_M[block],
            tokens.anchor_M[block],
            temperature=plan.temperature,
            tile_vocab=plan.tile_vocab,
            with_products=unscaled_NH is not None,
            with_moment=plan.entropy,
        )
        if moment_n is not None:
            tokens.moment_M[block] = moment_n
        if unscaled_NH is not None and several:
            unscaled_NH.index_copy_(0, tokens.kept_M[block], products_nH)
        elif unscaled_NH is not None:
            finish_gradient(products_nH, weight_RH, tokens, block, plan, unscaled_NH)
    if several and blocks:
        plan.tp.sum_(tokens.s_M)
        if plan.entropy:
            plan.tp.sum_(tokens.moment_M)
        for block in blocks if unscaled_NH is not None else ():
            finish_gradient(tokens.rows_of(unscaled_NH, block), weight_RH, tokens, block, plan, unscaled_NH)


def finish_gradient(products_nH, weight_RH, tokens: Tokens, block: slice, plan: Plan, out_NH) -> None:
    """Rows of out_NH: -(products - s W_t) / (T (e_t + s))."""
    s_n = tokens.s_M[block]
    scaled_n = (tokens.logit_M[block] - tokens.anchor_M[block]) / plan.temperature
    scale_n = -1 / ((torch.exp(scaled_n) + s_n) * plan.temperature)
    plan.passes.finish_gradient(
        products_nH, weight_RH, tokens.local_M[block], s_n, scale_n, out_NH, tokens.kept_M[block]
    )


def redo_overflowed(x_NH, weight_RH, tokens: Tokens, plan: Plan, unscaled_NH) -> None:
    """Phase 5: tokens whose s left the range of float32, once more with e_v = exp(l_v - max l).

    All ranks see the same s, so all agree on which tokens these are. NaN goes through here and stays NaN.
    """
    bad_B = (~(tokens.s_M <= OVERFLOW)).nonzero().squeeze(1)
    if bad_B.numel() == 0:
        return
    redone = tokens.subset(bad_B)
    redone.anchor_M = torch.empty_like(redone.logit_M)
    for block in redone.blocks(plan.block_tokens):
        redone.anchor_M[block] = row_max(redone.rows_of(x_NH, block), weight_RH)
    plan.tp.max_(redone.anchor_M)
    accumulate(x_NH, weight_RH, redone, plan, unscaled_NH)
    tokens.anchor_M = tokens.anchor_M.index_copy(0, bad_B, redone.anchor_M)
    tokens.s_M.index_copy_(0, bad_B, redone.s_M)
    tokens.moment_M.index_copy_(0, bad_B, redone.moment_M)


def recompute_grads(hidden_LH, weight_VH, tokens: Tokens, upstream_N, plan: Plan, *, needs_hidden: bool):
    """(d hidden_LH or None, d weight_VH): three products, vocabulary tile by tile.

    The tile loop is the outer one, so that a tile of dW is finished in float32 and rounded once; only dX is
    carried through all tiles in float32.
    """
    x_NH = plan.tp.gather_tokens(hidden_LH)
    x_MH = x_NH if tokens.kept_M.shape[0] == x_NH.shape[0] else x_NH.index_select(0, tokens.kept_M)
    dtype = tokens.s_M.dtype
    scale_M = -upstream_N.index_select(0, tokens.kept_M) / (tokens.total_M(plan.temperature) * plan.temperature)
    blocks = tokens.blocks(plan.backward_block_tokens)
    grad_x_MH = torch.zeros(x_MH.shape, dtype=dtype, device=x_MH.device) if needs_hidden else None
    grad_weight_VH = torch.zeros_like(weight_VH)  # zeros: padded rows have no gradient
    for start, tile_vH in tiles(weight_VH[: plan.rows], plan.backward_tile_vocab):
        grad_tile_vH = torch.zeros(tile_vH.shape, dtype=dtype, device=tile_vH.device)
        for block in blocks:
            grad_nv = plan.passes.grad_logits(
                x_MH[block],
                tile_vH,
                tokens.local_M[block] - start,
                tokens.anchor_M[block],
                scale_M[block],
                tokens.s_M[block],
                plan.temperature,
            )
            if grad_x_MH is not None:
                add_product(grad_x_MH[block], grad_nv, tile_vH.to(grad_nv.dtype))
            add_product(grad_tile_vH, grad_nv.T, x_MH[block].to(grad_nv.dtype))
        grad_weight_VH[start : start + tile_vH.shape[0]] = grad_tile_vH
    if grad_x_MH is None:
        return None, grad_weight_VH
    if grad_x_MH.shape[0] != x_NH.shape[0]:
        grad_x_NH = torch.zeros(x_NH.shape, dtype=dtype, device=x_NH.device)
        grad_x_MH = grad_x_NH.index_copy_(0, tokens.kept_M, grad_x_MH)
    return plan.tp.sum_tokens(grad_x_MH).to(hidden_LH.dtype), grad_weight_VH
