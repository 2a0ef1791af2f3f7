"""What a run's first step says about its reference: nothing crashes, and no curve looks odd, when it is not one.

Three questions, asked once, with a few forwards of the first micro-batch beside the step itself (two in float32, up to
six in bfloat16):

1. Where policy and reference begin as the same model, do they give a response the same log-prob? Then every margin is
   0. Asked of all pairs of the step (without dropout), and of the first micro-batch in evaluation mode (always).
2. If the policy's own weights are shaken (host/shaken_policy.py), do its log-probs change and the reference's stay?
   With B = 0, adapters left on in the reference's forward, and the two halves swapped, give the same step as none
   of it; here the first moves both, and the second the wrong one. They are shaken as little as shows: a policy that
   is far from itself would send all its tokens to a few experts, and those to one rank's memory.
3. Where the reference is cached: is it what the model says now?

Two computations of one log-prob differ by rounding. The residual stream of L layers is rounded 2·L times to eps/√12 of
its size, in both; the head makes of it about eps·√L a token, at random, and is worth HEAD layers itself. SIGMAS times
eps·√((L + HEAD)·T) are allowed over T tokens: 61 nats for a trace of 16,384 tokens through 94 layers in bfloat16,
3.5e-5 for 200 tokens through 4 layers in float32. Measured between one rank and TP 2, CP 2 and PP 2 on the tiny mixture
(a cache of the one, read by the others): at most .18 of it in float32 and .04 in bfloat16. Two forwards of one
micro-batch by the same kernels differ by far less, if at all: a sigma of these is allowed.

Shapes: Q sequences of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SIGMAS, HEAD = 6, 8
SCALES = tuple(2.0**-power for power in (9, 6, 4, 2, 0))
# 8-bit and 4-bit products: eps of e4m3 and of e2m1. A GPU's float32 products are TF32's.
EPS_FP8, EPS_FP4, EPS_TF32 = 0.125, 0.5, 2.0**-10
PREFIX = "Canary:"
MORE = 'docs/troubleshooting.md, "Canaries", has what to do'


@dataclass(frozen=True)
class Heard:
    """Log-probs of a micro-batch's sequences and their counted tokens, [Q] float64, detached."""

    policy_Q: Tensor
    reference_Q: Tensor
    tokens_Q: Tensor


@dataclass(frozen=True)
class Rounding:
    """What rounding explains: `eps` of the arithmetic, and the model's `layers`."""

    eps: float
    layers: int

    def of(self, tokens_Q: Tensor) -> Tensor:
        return SIGMAS * self.eps * ((self.layers + HEAD) * tokens_Q.clamp(min=1)).sqrt()

    def excess(self, pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
        """The largest |a − b| of (a_Q, b_Q, tokens_Q): in what rounding explains, and in nats. 0 for none.

        A micro-batch of demonstrations alone has no sequence that is compared.
        """
        pairs = [pair for pair in pairs if pair[0].numel()]
        if not pairs:
            return 0.0, 0.0
        apart = [torch.nan_to_num((a - b).abs(), nan=math.inf) for a, b, _ in pairs]
        shares = [d / self.of(tokens) for d, (_, _, tokens) in zip(apart, pairs, strict=True)]
        return torch.cat(shares).max().item(), torch.cat(apart).max().item()


def rounding_of(args, layers: int, device: torch.device | str | int) -> Rounding:
    """Of a run with these arguments on this device."""
    eps = torch.finfo(args.torch_dtype).eps
    if torch.empty(0, device=device).is_cuda:
        eps = max(eps, EPS_TF32)
    if args.fp8_format:
        eps = max(eps, EPS_FP8)
    if getattr(args, "fp4_format", None):
        eps = max(eps, EPS_FP4)
    return Rounding(eps, layers)


def reference_begins_as_policy(args, *, resumed: bool, policy_at_zero: bool) -> bool:
    """Whether the two are one model before the first step.

    Args:
        policy_at_zero: on every rank, what is trained on top of the reference (adapters, new layers) changes nothing.
    """
    if resumed:
        return False
    if args.bvpo_new_layers_only:
        return policy_at_zero
    if args.tuner_type == "full":
        same_model = not args.ref_model or args.ref_model == args.model
        return same_model and args.mcore_ref_model == args.mcore_model
    references = [*args.ref_adapters, *filter(None, [args.mcore_ref_adapter])]
    if references:
        return references == [*args.adapters, *filter(None, [args.mcore_adapter])]
    return policy_at_zero


def noisy(args, config) -> bool:
    """Whether the policy's training forward is random."""
    adapted = args.tuner_type != "full" and args.lora_dropout
    return bool(adapted or config.hidden_dropout or config.attention_dropout or config.moe_input_jitter_eps)


@dataclass(frozen=True)
class FirstStep:
    """What was heard of it on this rank.

    Attributes:
        step: of the step itself.
        plain, shaken: of its first micro-batch in evaluation mode: as it is, and with the policy's weights shaken.
        cached: (cached, new) log-probs of the reference, and token counts, of the sequences of `plain` that are known.
    """

    step: Sequence[Heard]
    plain: Sequence[Heard]
    shaken: Sequence[Heard]
    cached: Sequence[tuple[Tensor, Tensor, Tensor]] = ()

    def findings(self, rounding: Rounding) -> list[tuple[float, float]]:
        """(in what rounding explains, nats) of each comparison of `warnings`, in its order."""
        shaken = list(zip(self.plain, self.shaken, strict=True))
        return [
            rounding.excess([(h.policy_Q, h.reference_Q, h.tokens_Q) for h in self.step]),
            rounding.excess([(h.policy_Q, h.reference_Q, h.tokens_Q) for h in self.plain]),
            rounding.excess([(a.reference_Q, b.reference_Q, a.tokens_Q) for a, b in shaken]),
            rounding.excess([(a.policy_Q, b.policy_Q, a.tokens_Q) for a, b in shaken]),
            rounding.excess(list(self.cached)),
        ]


def largest_over_ranks(numbers: list[tuple[float, float]], device, group: dist.ProcessGroup) -> list[tuple]:
    """The largest of each number over `group`: one all-reduce."""
    largest = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return [tuple(pair) for pair in largest.tolist()]


def shows(findings: list[tuple[float, float]]) -> bool:
    """Whether shaking the policy moved something by more than rounding does."""
    _, _, reference, policy, _ = findings
    return max(reference[0], policy[0]) > 1


def warnings(
    findings: list[tuple[float, float]], *, begins_equal: bool, silent_step: bool, shaken: bool, adapted: bool
) -> list[str]:
    """One line for each canary that has stopped singing; `findings` over all ranks.

    Args:
        begins_equal: policy and reference are one model before this step.
        silent_step: the policy's training forward has no dropout, so that its step can be compared.
        shaken: some weight was.
        adapted: the policy is adapters on the reference's weights, not a model of its own.
    """
    step, plain, reference, policy, cached = findings
    told = []
    if cached[0] > 1:
        told.append(
            f"cached log-probs of the reference are not what it says now ({_size(cached)}). Likely: the cache is of "
            "another model or damaged. Train without --bvpo_ref_cache, or name an empty folder"
        )
    elif begins_equal and plain[0] > 1:
        told.append(
            f"policy and reference are one model at the start, and do not agree ({_size(plain)}), so that margins do "
            "not begin at 0. Likely: one of the two was not loaded whole, or from other files; --ref_adapters that "
            "are not the --adapters"
        )
    elif begins_equal and silent_step and step[0] > 1:
        told.append(
            f"policy and reference are one model and agree in evaluation, but not in the first step ({_size(step)}), "
            "so that margins do not begin at 0. Likely: dropout or other noise is live in the policy's training forward"
        )
    moved, stayed = policy[0] * SIGMAS > 1, reference[0] * SIGMAS <= 1
    if shaken and not stayed and moved:
        why = "the adapters are not switched off in the reference's forward" if adapted else "they share weights"
        told.append(f"the reference moves with the policy's weights ({_size(reference)}). Likely: {why}")
    elif shaken and not stayed:
        told.append(
            f"the policy's weights move the reference's log-probs ({_size(reference)}) and not the policy's own. "
            "Likely: the two halves of the output are swapped"
        )
    elif shaken and not moved:
        why = "the adapters are off in the policy's forward, too" if adapted else "it is not the model that is trained"
        told.append(f"the policy's log-probs do not depend on what is trained. Likely: {why}")
    return [f"{PREFIX} {line}. {MORE}." for line in told]


def _size(finding: tuple[float, float]) -> str:
    times, nats = finding
    return f"up to {nats:.3g} nats a response, {times:.3g} times what rounding explains"
