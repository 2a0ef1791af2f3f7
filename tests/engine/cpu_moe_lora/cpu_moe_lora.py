"""A plugin for vLLM's engine on a CPU: plain PyTorch where it has a Triton kernel alone, LoRA on fused experts.

vLLM 0.32 takes TritonExperts for every unquantised mixture that is served with --enable-lora, on a CPU as well, where
its first request ends the engine. Reading adapters, slots, and which token has which adapter stay the engine's
own: this replaces the two products of an expert and nothing else.
"""

import torch
from torch.nn.functional import silu


def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *rest, **more):
    """TritonExperts.apply: w1 [E, 2I, H] with gate's rows before up's, w2 [E, H, I]; slot −1 has no adapter."""
    lora = self._lora_context
    slots = torch.full((len(hidden_states),), -1)
    if lora is not None and lora.punica_wrapper.indices_len[0] is not None:
        known = lora.punica_wrapper.token_lora_indices[: len(slots)]
        slots[: len(known)] = known
    output.zero_()
    for slot in slots.unique().tolist():
        for expert in topk_ids.unique().tolist():
            rows, choice = ((slots == slot)[:, None] & (topk_ids == expert)).nonzero(as_tuple=True)
            x = hidden_states[rows]
            hidden = x @ w1[expert].T
            if slot >= 0:
                factors = zip(lora.w13_lora_a_stacked, lora.w13_lora_b_stacked, strict=True)
                hidden += torch.cat([x @ a[slot, expert].T @ b[slot, expert].T for a, b in factors], dim=1)
            gate, up = hidden.chunk(2, dim=1)
            hidden = silu(gate) * up
            y = hidden @ w2[expert].T
            if slot >= 0:
                a, b = lora.w2_lora_a_stacked[0], lora.w2_lora_b_stacked[0]
                y += hidden @ a[slot, expert].T @ b[slot, expert].T
            output.index_add_(0, rows, y * topk_weights[rows, choice, None])


def register():
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = apply
