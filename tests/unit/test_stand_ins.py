"""The Transformer Engine stand-ins against plain float64 autograd, torch's SDPA and torch's optimizers."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb  # noqa: E402
from transformer_engine.pytorch.optimizers import (  # noqa: E402
    FusedAdam,
    FusedSGD,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)

ROOT = Path(__file__).parents[2]
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise(module):
    """Parameters away from 0 and 1, so that none is without effect."""
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, dtype=F64) * 0.3 + 0.2)
    return module


def check_same(module, reference, inp, pick=lambda out: out, **call):
    """Output and all gradients of the module and of a float64 function of (input, parameters)."""
    x = inp.clone().requires_grad_()
    out = pick(module(x, **call))
    y = inp.clone().requires_grad_()
    copies = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    expected = reference(y, copies)
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-11)
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.grad, copies[name].grad, rtol=1e-10, atol=1e-11, msg=name)


def rms(x, weight, eps):
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def standardise(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt()


# -------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    module = randomise(te.Linear(7, 5, bias=bias, params_dtype=F64))
    check_same(
        module,
        lambda x, p: torch.einsum("sbi,oi->sbo", x, p["weight"]) + p.get("bias", 0),
        torch.randn(3, 2, 7, dtype=F64),
    )


def test_linear_returns_the_bias_instead_of_adding_it():
    module = randomise(te.Linear(7, 5, return_bias=True, params_dtype=F64))
    out, bias = module(torch.zeros(3, 7, dtype=F64))
    assert bias is module.bias
    assert torch.equal(out, torch.zeros(3, 5, dtype=F64))


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms(kind, zero_centered):
    module = randomise(getattr(te, kind)(9, eps=1e-3, zero_centered_gamma=zero_centered, params_dtype=F64))

    def reference(x, p):
        gamma = p["weight"] + zero_centered
        return rms(x, gamma, 1e-3) if kind == "RMSNorm" else standardise(x, 1e-3) * gamma + p["bias"]

    check_same(module, reference, torch.randn(4, 2, 9, dtype=F64))


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_return_the_dtype_of_their_weight(kind):
    norm = getattr(te, kind)(9, params_dtype=torch.bfloat16)
    inp = torch.randn(4, 9, requires_grad=True)
    out = norm(inp)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and inp.grad.dtype == torch.float32


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_layernorm_linear_and_its_normed_output(kind, zero_centered):
    module = te.LayerNormLinear(
        9,
        5,
        eps=1e-3,
        normalization=kind,
        zero_centered_gamma=zero_centered,
        return_layernorm_output=True,
        params_dtype=F64,
    )

    def reference(x, p):
        gamma = p["layer_norm_weight"] + zero_centered
        normed = rms(x, gamma, 1e-3)
        if kind == "LayerNorm":
            normed = standardise(x, 1e-3) * gamma + p["layer_norm_bias"]
        return torch.cat((normed @ p["weight"].T + p["bias"], normed), -1)

    check_same(randomise(module), reference, torch.randn(4, 2, 9, dtype=F64), pick=lambda out: torch.cat(out, -1))


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "geglu", "reglu", "swiglu"])
def test_layernorm_mlp(activation):
    module = randomise(te.LayerNormMLP(6, 8, activation=activation, normalization="RMSNorm", params_dtype=F64))

    def reference(x, p):
        hidden = rms(x, p["layer_norm_weight"], 1e-5) @ p["fc1_weight"].T + p["fc1_bias"]
        act = {"ge": lambda h: F.gelu(h, approximate="tanh"), "re": F.relu, "si": F.silu, "sw": F.silu}[activation[:2]]
        if activation.endswith("glu"):
            hidden = act(hidden[..., :8]) * hidden[..., 8:]
        else:
            hidden = act(hidden)
        return hidden @ p["fc2_weight"].T + p["fc2_bias"]

    check_same(module, reference, torch.randn(4, 2, 6, dtype=F64))


def test_grouped_linear_with_an_empty_group():
    module = randomise(te.GroupedLinear(3, 4, 5, params_dtype=F64))
    splits = [3, 0, 4]

    def reference(x, p):
        rows = [x[:3] @ p["weight0"].T + p["bias0"], x[3:] @ p["weight2"].T + p["bias2"]]
        return torch.cat(rows) + 0 * (p["weight1"].sum() + p["bias1"].sum())

    check_same(module, reference, torch.randn(7, 4, dtype=F64), m_splits=splits)
    assert torch.equal(module.weight1.grad, torch.zeros(5, 4, dtype=F64))


def test_grouped_linear_refuses_splits_that_do_not_add_up():
    module = te.GroupedLinear(2, 4, 5)
    with pytest.raises(ValueError, match="sums to 5 rows, the input has 7"):
        module(torch.zeros(7, 4), [2, 3])


def test_fp8_padding_pads_and_unpads():
    inp = torch.randn(5, 3)
    padded, rows = te.Fp8Padding(2, 4)(inp, [3, 2])
    assert rows == [4, 4]
    assert torch.equal(padded[:3], inp[:3]) and torch.equal(padded[4:6], inp[3:])
    assert padded[3].abs().sum() == 0 and padded[6:].abs().sum() == 0
    assert torch.equal(te.Fp8Unpadding(2, 4)(padded, [3, 2]), inp)


def test_bf16_layers_are_as_good_as_bf16_can_be():
    """Against float64 of the same rounded numbers: at most one rounding of the output away."""
    module = te.LayerNormLinear(64, 32, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16)
    inp = torch.randn(10, 64).bfloat16()
    normed = rms(inp.double(), module.layer_norm_weight.double(), 1e-5).bfloat16().double()
    exact = normed @ module.weight.double().T
    assert module(inp).dtype == torch.bfloat16
    torch.testing.assert_close(module(inp).double(), exact, rtol=2**-8, atol=2**-8 * exact.abs().max().item())


def test_a_layer_refuses_another_dtype_than_its_own():
    with pytest.raises(TypeError, match="float32.*bfloat16"):
        te.Linear(4, 4, params_dtype=torch.bfloat16)(torch.zeros(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_and_packed_attention_in_bf16_on_a_gpu():
    """The stand-ins without the torch.cuda ones: parameters land on the GPU, results are bf16's."""
    fused = te.LayerNormLinear(64, 64, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16)
    assert fused.weight.is_cuda
    inp = torch.randn(10, 64).bfloat16()
    normed = rms(inp.double(), fused.layer_norm_weight.double().cpu(), 1e-5)
    exact = normed @ fused.weight.double().cpu().T
    out = fused(inp.cuda()).double().cpu()
    torch.testing.assert_close(out, exact, rtol=2**-6, atol=2**-6 * exact.abs().max().item())

    q, k, v = (torch.randn(10, heads, 16).bfloat16() for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    attention = te.DotProductAttention(4, 16, 2, qkv_format="thd", attn_mask_type="padding_causal")
    exact = attention(q.double(), k.double(), v.double(), cu_seqlens_q=bounds)
    out = attention(q.cuda(), k.cuda(), v.cuda(), cu_seqlens_q=bounds.cuda())
    torch.testing.assert_close(out.double().cpu(), exact, rtol=2**-7, atol=2**-7)

    param = torch.ones(4, device="cuda").requires_grad_()
    param.grad = torch.ones(4, device="cuda")
    FusedAdam([param], lr=0.5).step()
    torch.testing.assert_close(param.cpu(), torch.full((4,), 0.5))


# ---------------------------------------------------------------------------------------------- attributes


def attributes(param):
    names = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
    return {name: getattr(param, name) for name in names if hasattr(param, name)}


def test_parameter_attributes_are_those_of_te():
    column = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
    row = {**column, "partition_dim": 1}
    # TE's fault: also a replicated weight is flagged as tensor-parallel.
    assert attributes(te.Linear(4, 4).weight) == column
    assert attributes(te.Linear(4, 4).bias) == {}
    assert attributes(te.Linear(4, 4, parallel_mode="column").bias) == column
    assert attributes(te.Linear(4, 4, parallel_mode="row").weight) == row
    assert attributes(te.Linear(4, 4, parallel_mode="row").bias) == {"sequence_parallel": False}
    fused = te.LayerNormLinear(4, 4, parallel_mode="column", sequence_parallel=True, tp_size=2)
    assert attributes(fused.weight) == column
    assert attributes(fused.layer_norm_weight) == attributes(fused.layer_norm_bias) == {"sequence_parallel": True}
    assert attributes(te.GroupedLinear(2, 4, 4).weight1) == column
    assert attributes(te.GroupedLinear(2, 4, 4, parallel_mode="row").weight0) == row
    assert attributes(te.RMSNorm(4, sequence_parallel=True).weight) == {"sequence_parallel": True}
    assert attributes(te.RMSNorm(4).weight) == {}


def test_parameter_order_shapes_and_extra_state():
    fused = te.LayerNormLinear(4, 6, parallel_mode="column", tp_size=2)
    assert list(fused.state_dict()) == [
        "layer_norm_weight",
        "layer_norm_bias",
        "weight",
        "bias",
        "_extra_state",
    ]
    assert fused.weight.shape == (3, 4) and fused.bias.shape == (3,)
    assert te.Linear(4, 6, parallel_mode="row", tp_size=2).weight.shape == (6, 2)
    state = te.Linear(4, 6).state_dict()["_extra_state"]
    assert state.dtype == torch.uint8 and state.numel() == 0
    assert isinstance(te.Linear(4, 6, bias=False).bias, torch.Tensor)
    with pytest.raises(ValueError, match="in_features=5 cannot be divided over 2"):
        te.Linear(5, 6, parallel_mode="row", tp_size=2)


def test_what_cannot_be_done_names_the_remedy():
    with pytest.raises(NotImplementedError, match="--gradient_accumulation_fusion false"):
        te.Linear(4, 4, fuse_wgrad_accumulation=True)
    with pytest.raises(NotImplementedError, match="--fp8_format"), te.fp8_autocast(enabled=True):
        pass
    from transformer_engine.pytorch import permutation, router

    with pytest.raises(NotImplementedError, match="--moe_permute_fusion false"):
        permutation.moe_permute()
    with pytest.raises(NotImplementedError, match="--moe_router_fusion false"):
        router.fused_moe_aux_loss()
    with te.fp8_autocast(enabled=False), te.fp8_model_init(enabled=False):
        pass


# ----------------------------------------------------------------------------------------------- attention


def sdpa(q, k, v, hidden=None, scale=None):
    """[S, B, heads, D] through torch's SDPA -> [S, B, N*D]; `hidden` broadcasts to [B, N, Q, K]."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    allowed = None if hidden is None else ~hidden.expand(q.shape[1], q.shape[2], q.shape[0], k.shape[0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), attn_mask=allowed, scale=scale
        )
    return out.permute(2, 0, 1, 3).flatten(2)


def check_attention(run, reference, q, k, v):
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, expected = run(*mine), reference(*theirs)
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-11)


def qkv(length, batch=2, heads=4, groups=2, size=8, keys=None):
    shapes = ((length, heads), (keys or length, groups), (keys or length, groups))
    return tuple(torch.randn(n, batch, h, size, dtype=F64) for n, h in shapes)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("mask_type", ["causal", "no_mask"])
def test_attention_padded_layouts(mask_type, scale):
    q, k, v = qkv(11)
    hidden = torch.ones(11, 11).triu(1).bool() if mask_type == "causal" else None
    attention = te.DotProductAttention(4, 8, 2, attn_mask_type=mask_type, softmax_scale=scale)
    check_attention(attention, lambda *x: sdpa(*x, hidden=hidden, scale=scale), q, k, v)
    batch_first = attention(*(x.transpose(0, 1) for x in (q, k, v)), qkv_format="bshd")
    torch.testing.assert_close(batch_first, attention(q, k, v).transpose(0, 1))


def test_attention_ignores_the_mask_where_the_type_does_not_name_it():
    q, k, v = qkv(6)
    attention = te.DotProductAttention(4, 8, 2, attn_mask_type="causal")
    everything_hidden = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert torch.equal(attention(q, k, v, everything_hidden), attention(q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_padding_masks_and_their_empty_rows(causal):
    q, k, v = qkv(7)
    lengths = torch.tensor([7, 4])
    padded = torch.arange(7)[None] >= lengths[:, None]
    hidden = padded[:, None, None, :] | (torch.ones(7, 7).triu(1).bool() if causal else torch.zeros(7, 7).bool())
    real = (~padded).T[..., None]
    attention = te.DotProductAttention(4, 8, 2)
    kind = "padding_causal" if causal else "padding"

    def reference(*x):
        return sdpa(*x, hidden=hidden) * real

    check_attention(lambda *x: attention(*x, padded[:, None, None, :], attn_mask_type=kind), reference, q, k, v)
    bounds = torch.tensor([0, 7, 11], dtype=torch.int32)
    by_length = attention(q, k, v, attn_mask_type=kind, cu_seqlens_q=bounds)
    torch.testing.assert_close(by_length, reference(q, k, v))


def test_attention_arbitrary_mask_with_a_blind_row():
    q, k, v = qkv(6)
    hidden = torch.rand(2, 1, 6, 6) < 0.4
    hidden[..., 0] = False
    hidden[1, 0, 3] = True
    seen = torch.ones(6, 2, 1)
    seen[3, 1] = 0
    attention = te.DotProductAttention(4, 8, 2, attn_mask_type="arbitrary")
    safe = hidden & ~hidden.all(-1, keepdim=True)
    check_attention(lambda *x: attention(*x, hidden), lambda *x: sdpa(*x, hidden=safe) * seen, q, k, v)


def test_attention_bottom_right_window_and_bias():
    q, k, v = qkv(4, keys=7)
    attention = te.DotProductAttention(4, 8, 2, attn_mask_type="causal_bottom_right")
    check_attention(attention, lambda *x: sdpa(*x, hidden=torch.ones(4, 7).triu(4).bool()), q, k, v)

    q, k, v = qkv(9)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    attention = te.DotProductAttention(4, 8, 2, attn_mask_type="causal", window_size=(3, 0))
    check_attention(attention, lambda *x: sdpa(*x, hidden=(distance < 0) | (distance > 3)), q, k, v)

    bias = torch.randn(1, 4, 9, 9, dtype=F64)
    attention = te.DotProductAttention(4, 8, 2, attn_mask_type="no_mask")
    groups = [x.repeat_interleave(h, 2).permute(1, 2, 0, 3) for x, h in ((q, 1), (k, 2), (v, 2))]
    expected = F.scaled_dot_product_attention(*groups, attn_mask=bias).permute(2, 0, 1, 3).flatten(2)
    out = attention(q, k, v, core_attention_bias_type="post_scale_bias", core_attention_bias=bias)
    torch.testing.assert_close(out, expected)


def test_attention_learnable_sink():
    q, k, v = qkv(5, groups=4)
    attention = te.DotProductAttention(4, 8, 4, softmax_type="learnable", attn_mask_type="no_mask").double()
    with torch.no_grad():
        attention.softmax_offset.copy_(torch.randn(4))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / 8**0.5
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + attention.softmax_offset.exp()[:, None, None])
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bnqk,kbnd->qbnd", weights, v).flatten(2))


@pytest.mark.parametrize("mask_type", ["padding_causal", "padding"])
@pytest.mark.parametrize("gaps", [False, True])
def test_attention_packed(mask_type, gaps):
    """Each sequence alone through SDPA; rows of padding come out as zeros, and so do their gradients."""
    true, blocks = [3, 1, 5], ([4, 4, 6] if gaps else [3, 1, 5])
    tail = 2
    total = sum(blocks) + tail
    q, k, v = (x[:, 0] for x in qkv(total, batch=1))
    bounds = torch.tensor([0, *torch.tensor(true).cumsum(0).tolist()], dtype=torch.int32)
    padded = torch.tensor([0, *torch.tensor(blocks).cumsum(0).tolist()], dtype=torch.int32)
    attention = te.DotProductAttention(4, 8, 2)

    def run(*x):
        return attention(
            *x,
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=padded if gaps else None,
            cu_seqlens_kv_padded=padded if gaps else None,
            attn_mask_type=mask_type,
        )

    def reference(q, k, v):
        rows, start = [], 0
        for length, block in zip(true, blocks, strict=True):
            part = slice(start, start + length)
            hidden = torch.ones(length, length).triu(1).bool() if "causal" in mask_type else None
            rows.append(sdpa(*(x[part][:, None] for x in (q, k, v)), hidden=hidden)[:, 0])
            rows.append(torch.zeros(block - length, 32, dtype=F64))
            start += block
        return torch.cat([*rows, torch.zeros(tail, 32, dtype=F64)])

    check_attention(run, reference, q, k, v)


def test_attention_dropout_keeps_the_mean_and_stops_in_eval():
    q, k, v = (x.float() for x in qkv(8))
    attention = te.DotProductAttention(4, 8, 2, attention_dropout=0.5, attn_mask_type="no_mask")
    exact = attention.eval()(q, k, v)
    attention.train()
    mean = torch.stack([attention(q, k, v) for _ in range(2000)]).mean(0)
    assert not torch.equal(attention(q, k, v), exact)
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.1)


def as_complex(t, interleaved):
    """Pairs of features as complex numbers: rotation is multiplication by exp(i angle)."""
    half = t.shape[-1] // 2
    return torch.complex(t[..., ::2], t[..., 1::2]) if interleaved else torch.complex(t[..., :half], t[..., half:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_rotates_by_position(interleaved):
    t = torch.randn(6, 2, 3, 8, dtype=F64)
    angles = torch.randn(10, 1, 1, 4, dtype=F64)
    freqs = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    out = apply_rotary_pos_emb(t, freqs, interleaved=interleaved)
    expected = as_complex(t, interleaved) * torch.polar(torch.ones_like(angles), angles)[:6]
    torch.testing.assert_close(as_complex(out, interleaved), expected)
    batch_first = apply_rotary_pos_emb(t.transpose(0, 1), freqs, "bshd", interleaved=interleaved)
    torch.testing.assert_close(batch_first, out.transpose(0, 1))

    bounds = torch.tensor([0, 4, 6])
    packed = apply_rotary_pos_emb(t[:, 0], freqs, "thd", cu_seqlens=bounds, interleaved=interleaved)
    torch.testing.assert_close(packed[:4], out[:4, 0])
    second = apply_rotary_pos_emb(t[4:], freqs, interleaved=interleaved)
    torch.testing.assert_close(packed[4:], second[:, 0])


def test_rope_of_a_part_of_the_features_on_a_context_parallel_rank():
    t = torch.randn(8, 1, 2, 8, dtype=F64)
    angles = torch.randn(8, 1, 1, 2, dtype=F64)
    freqs = torch.cat((angles, angles), -1)
    whole = apply_rotary_pos_emb(t, freqs)
    assert torch.equal(whole[..., 4:], t[..., 4:])
    held = [2, 3, 4, 5]  # chunks 1 and 2 of 4
    torch.testing.assert_close(apply_rotary_pos_emb(t[held], freqs, cp_size=2, cp_rank=1), whole[held])
    packed = apply_rotary_pos_emb(t[held, 0], freqs, "thd", cu_seqlens=torch.tensor([0, 8]), cp_size=2, cp_rank=1)
    torch.testing.assert_close(packed, whole[held, 0])


# ---------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("adam_w", [True, False])
def test_fused_adam_follows_torch(adam_w):
    mine = [torch.randn(5, 3).requires_grad_(), torch.randn(4).requires_grad_()]
    theirs = [p.detach().double().requires_grad_() for p in mine]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    adam = FusedAdam(mine, adam_w_mode=adam_w, **options)
    reference = (torch.optim.AdamW if adam_w else torch.optim.Adam)(theirs, **options)
    for _ in range(7):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.double()
        adam.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(adam.state[a]["exp_avg_sq"].double(), reference.state[b]["exp_avg_sq"])
    assert adam.param_groups[0]["step"] == 7
    assert set(adam.state[mine[0]]) == {"exp_avg", "exp_avg_sq"}


def test_fused_adam_resumes_where_it_stopped():
    param = torch.randn(6).requires_grad_()
    adam = FusedAdam([{"params": [param]}, {"params": []}], lr=0.1)
    grads = torch.randn(6, 6)
    for i in range(3):
        param.grad = grads[i].clone()
        adam.step()
    assert [group["step"] for group in adam.param_groups] == [3, 3]
    copy = param.detach().clone().requires_grad_()
    resumed = FusedAdam([{"params": [copy]}, {"params": []}], lr=0.1)
    resumed.load_state_dict(adam.state_dict())
    for i in range(3, 6):
        param.grad, copy.grad = grads[i].clone(), grads[i].clone()
        adam.step()
        resumed.step()
    assert torch.equal(param, copy)


def test_fused_adam_states_of_bf16_parameters_are_float32_and_masters_keep_small_steps():
    param = torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    adam = FusedAdam([param], lr=1e-4, master_weights=True)
    for _ in range(100):
        param.grad = torch.ones(4, dtype=torch.bfloat16)
        adam.step()
    assert adam.state[param]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(adam.get_unscaled_state(param, "master_param"), torch.full((4,), 0.99))
    torch.testing.assert_close(param.float(), torch.full((4,), 0.99).bfloat16().float())
    resumed = FusedAdam([param], lr=1e-4, master_weights=True)
    resumed.load_state_dict(adam.state_dict())
    assert resumed.state[param]["exp_avg_sq"].dtype == torch.float32
    with pytest.raises(NotImplementedError, match="store_param_remainders"):
        FusedAdam([param], master_weights=True, store_param_remainders=True)


def test_fused_sgd_follows_torch():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    mine, theirs = FusedSGD([a], lr=0.1, momentum=0.9), torch.optim.SGD([b], lr=0.1, momentum=0.9)
    for _ in range(3):
        a.grad, b.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
        mine.step()
        theirs.step()
    assert torch.equal(a, b)


def test_multi_tensor_operations():
    noop = torch.zeros(1, dtype=torch.int)
    tensors = [torch.randn(3, 4), torch.randn(7)]
    norm, each = multi_tensor_applier(multi_tensor_l2norm, noop, [tensors], True)
    torch.testing.assert_close(norm, torch.cat([t.flatten() for t in tensors]).norm().reshape(1))
    torch.testing.assert_close(each, torch.stack([t.norm() for t in tensors]))
    out = [torch.empty(3, 4), torch.empty(7)]
    multi_tensor_applier(multi_tensor_scale, noop, [tensors, out], 0.5)
    assert torch.equal(out[1], tensors[1] * 0.5) and noop.item() == 0
    multi_tensor_applier(multi_tensor_scale, noop, [[torch.tensor([float("inf")])], [torch.empty(1)]], 1.0)
    assert noop.item() == 1


# ------------------------------------------------------------------------------------ rng and recomputation


def test_checkpoint_repeats_the_trackers_dropout():
    tracker = te.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)
    x = torch.randn(50, requires_grad=True)

    def run(x):
        with tracker.fork():
            return F.dropout(x, 0.5) * x

    out = te.checkpoint(run, x, get_rng_state_tracker=lambda: tracker)
    after = tracker.get_states()["model-parallel-rng"].clone()
    out.sum().backward()
    kept = out.detach() != 0
    torch.testing.assert_close(x.grad, torch.where(kept, 4 * x.detach(), 0.0))
    assert torch.equal(tracker.get_states()["model-parallel-rng"], after)


def test_tracker_states_do_not_touch_the_outer_one():
    tracker = te.CudaRNGStatesTracker()
    outer = torch.get_rng_state()
    tracker.add("a", 1)
    with tracker.fork("a"):
        first = torch.rand(3)
    with tracker.fork("a"):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), outer)
    with pytest.raises(RuntimeError, match="already used"):
        tracker.add("b", 1)
    with pytest.raises(KeyError, match="'c' was not added"), tracker.fork("c"):
        pass


# ------------------------------------------------------------------------------------------------ installing


def run_python(folder, code):
    """Fresh interpreter: the device stand-ins would stay in this one. A file: torch.jit wants sources."""
    file = folder / "code.py"
    file.write_text(code)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("BVPO_REHEARSAL", "LOCAL_WORLD_SIZE")
    }
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, file],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins for a machine without a GPU")
def test_device_stand_ins(tmp_path):
    run_python(
        tmp_path,
        """
import sys
from megatron_bvpo.rehearsal import install
install(); install()
import torch, torch._dynamo
assert 'megatron' not in sys.modules and 'transformer_engine' not in sys.modules
assert torch.zeros(2, device='cuda').device.type == 'cpu'
assert torch.tensor([1], device='cpu', pin_memory=True).cuda(non_blocking=True).tolist() == [1]
assert torch.empty(1, device=torch.cuda.current_device()).to('cuda:0').to(device='cuda').device.type == 'cpu'
assert torch.nn.Linear(2, 2, device='cuda').cuda().to('cuda').weight.device.type == 'cpu'
assert torch.ones(1).type() == 'torch.cuda.FloatTensor'
assert torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)).type() == 'torch.cuda.BFloat16Tensor'
assert torch.ones(1).type('torch.cuda.HalfTensor').dtype == torch.float16
assert torch.ones(1).type(torch.int32).dtype == torch.int32
assert torch.ones(1).pin_memory().record_stream(torch.cuda.current_stream()) is None
side = torch.cuda.Stream()
assert torch.cuda.current_stream() == torch.cuda.default_stream() != side
with torch.cuda.stream(side):
    assert torch.cuda.current_stream() is side
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record(); side.wait_stream(torch.cuda.current_stream()); end.record()
assert start.elapsed_time(end) >= 0
torch.cuda.manual_seed(3); state = torch.cuda.get_rng_state(); a = torch.nn.functional.dropout(torch.ones(99))
torch.cuda.set_rng_state(state); assert torch.equal(a, torch.nn.functional.dropout(torch.ones(99)))
torch.manual_seed(3); assert torch.equal(torch.cuda.default_generators[0].get_state(), state)
state = torch.cuda.get_rng_state(); loader = torch.utils.data.DataLoader([1, 2], shuffle=False)
seeds = [iter(loader)._base_seed for _ in range(2)]
torch.manual_seed(3); assert [iter(loader)._base_seed for _ in range(2)] == seeds != seeds[:1] * 2
assert torch.equal(torch.cuda.get_rng_state(), state)
assert torch.cuda.max_memory_reserved() == torch.cuda.memory_allocated() == 0
assert not torch.cuda.is_available() and torch.cuda.device_count() == 1
torch.cuda.nvtx.range_push('x'); torch.cuda.synchronize(); torch.cuda.empty_cache()
with torch.cuda.device(0): pass
@torch.jit.script
def f(x):
    return torch.zeros(x.shape) + torch.ones_like(x)
assert f(torch.zeros(2)).tolist() == [1, 1]
assert torch.compile(lambda x: x + 1)(torch.zeros(1)).tolist() == [1]
import io
buffer = io.BytesIO(); torch.save(torch.ones(2), buffer); buffer.seek(0)
assert torch.load(buffer, map_location='cuda').tolist() == [1, 1]
""",
    )


def test_install_of_the_engine_alone_leaves_the_device_and_refuses_to_come_too_late(tmp_path):
    out = run_python(
        tmp_path,
        """
import sys, types
from megatron_bvpo import rehearsal
assert not rehearsal.wanted()
import torch
before = torch.cuda.current_device, torch.Tensor.cuda
rehearsal.install(device=False, transformer_engine=True)
import transformer_engine as te, transformer_engine_torch as tex
assert te.__version__.endswith('+rehearsal')
assert (torch.cuda.current_device, torch.Tensor.cuda) == before
bounds = torch.tensor([0, 8, 12])
assert tex.thd_get_partitioned_indices(bounds, 12, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
fake = sys.modules['transformer_engine'] = types.ModuleType('transformer_engine')
fake.__file__ = '/x'
try:
    rehearsal.install(device=False, transformer_engine=True)
except RuntimeError as error:
    print(error)
""",
    )
    assert "already imported from /x" in out


def test_numpy_conversion_is_patched_when_megatron_comes(tmp_path):
    """In a package of the same names: megatron itself takes seconds to import."""
    folder = tmp_path / "megatron" / "core" / "transformer" / "moe"
    folder.mkdir(parents=True)
    for parent in (folder, *list(folder.parents)[:3]):
        (parent / "__init__.py").write_text("")
    (folder / "moe_utils.py").write_text(
        "def maybe_move_tensor_to_cpu(t, as_numpy=False, record_stream=False):\n    return t\n"
    )
    (folder / "token_dispatcher.py").write_text(
        f"from {'megatron.core.transformer.moe.moe_utils'} import maybe_move_tensor_to_cpu\n"
    )
    for early in (False, True):
        run_python(
            tmp_path,
            f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
if {early}:
    import megatron.core.transformer.moe.token_dispatcher
from megatron_bvpo.rehearsal.megatron_patches import patch_megatron
patch_megatron(); patch_megatron()
from megatron.core.transformer.moe import moe_utils, token_dispatcher
for module in (moe_utils, token_dispatcher):
    assert module.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True).tolist() == [1, 1]
    assert not torch.is_tensor(module.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True))
    assert torch.is_tensor(module.maybe_move_tensor_to_cpu(torch.ones(2)))
assert len(sys.meta_path) == len(set(map(id, sys.meta_path)))
""",
        )


def test_resuming_in_float32_is_patched():
    from megatron_bvpo.rehearsal import megatron_patches

    class DistributedOptimizer:
        def _set_main_param_and_optimizer_states(self, param, value):
            param.view(-1).copy_(value)

    module = types.ModuleType("distrib_optimizer")
    module.DistributedOptimizer = DistributedOptimizer
    param = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        DistributedOptimizer()._set_main_param_and_optimizer_states(param, torch.ones(2))
    megatron_patches._load_without_gradients(module)
    DistributedOptimizer()._set_main_param_and_optimizer_states(param, torch.ones(2))
    assert param.tolist() == [1, 1]
    del DistributedOptimizer._set_main_param_and_optimizer_states
    with pytest.raises(RuntimeError, match="has no _set_main_param_and_optimizer_states"):
        megatron_patches._load_without_gradients(module)
