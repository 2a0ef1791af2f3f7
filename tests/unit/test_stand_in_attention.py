"""The Transformer Engine stand-ins' attention and rotary embedding against torch's SDPA and complex numbers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb  # noqa: E402

ROOT = Path(__file__).parents[2]
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


def test_a_checkpoint_without_attention_s_extra_state_is_loaded_strictly():
    """As Megatron's are, which ms-swift loads so under virtual pipeline stages; of other layers it is missed."""
    model = torch.nn.ModuleDict({"core_attention": te.DotProductAttention(2, 8), "other": te.Linear(4, 4)})
    state = {key: value for key, value in model.state_dict().items() if key != "core_attention._extra_state"}
    assert len(state) < len(model.state_dict())
    model.load_state_dict(state)
    del state["other._extra_state"]
    with pytest.raises(RuntimeError, match="other._extra_state"):
        model.load_state_dict(state)
