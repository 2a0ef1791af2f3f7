"""A tiny Qwen3.5 on the ranks of a test: mcore-bridge's multimodal wrapper around a language model.

Three gated delta nets and one layer of attention. The delta nets are transformers' own
(`USE_MCORE_GDN=0`): Megatron's need flash-linear-attention, which needs a GPU.
"""

from __future__ import annotations

import os

import torch

VOCAB = 1002  # two ranks divide it: whole logits count rows of padding in their softmax, fused ones do not


def install_stand_ins() -> None:
    from megatron_bvpo.rehearsal import install

    os.environ["USE_MCORE_GDN"] = "0"  # read when mcore-bridge is imported
    install()


def hf_config(kind: str):
    """`dense` (qwen3_5) or `moe` (qwen3_5_moe), with a vision tower of one layer."""
    import transformers

    text = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=4,  # every fourth is attention: mcore-bridge and transformers agree on no other number
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1e6,
            partial_rotary_factor=0.5,
            mrope_section=[2, 1, 1],
            mrope_interleaved=True,
        ),
    )
    if kind == "moe":
        made = transformers.Qwen3_5MoeConfig
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    else:
        made = transformers.Qwen3_5Config
        text |= dict(intermediate_size=96)
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, num_position_embeddings=16
    )
    return made(text_config=text, vision_config=vision, tie_word_embeddings=False)


def whole_and_fused(rank: int, world_size: int, kind: str) -> dict:
    """Token log-probs (negated, [B, S]) and the gradients of their weighted sum, from whole logits and fused.

    Returns:
        `logps`: two tensors; `gradients`: two dicts by parameter name; `fused`: the head was replaced.
    """
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from megatron.core import parallel_state, tensor_parallel

    from megatron_bvpo.host.fused_head import install_fused_head
    from megatron_bvpo.host.patches import apply_patches

    apply_patches()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    described = {k: v for k, v in hf_to_mcore_config(hf_config(kind)).items() if k != "params_dtype"}
    config = ModelConfig(
        **described,
        params_dtype=torch.float32,
        language_model_only=True,
        tensor_model_parallel_size=world_size,
        sequence_parallel=world_size > 1,
        variable_seq_lengths=True,
    )
    (model,) = get_mcore_model(config)
    generator = torch.Generator().manual_seed(rank)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(24).expand(3, 2, -1)
    weights = torch.randn(2, 24, generator=torch.Generator().manual_seed(4))

    def run():
        model.zero_grad()
        losses = model(
            input_ids=tokens, position_ids=positions, attention_mask=None, labels=torch.roll(tokens, -1, dims=1)
        )
        (losses * weights).sum().backward()
        return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = run()
    install_fused_head(model, impl="torch", vocab_size=VOCAB, memory_gib=1.0)
    fused = run()
    return {
        "logps": (whole[0], fused[0]),
        "gradients": (whole[1], fused[1]),
        "fused": "_forward_output_layer" in vars(model.language_model),
        "names": [type(layer.self_attention).__name__ for layer in model.language_model.decoder.layers],
    }
