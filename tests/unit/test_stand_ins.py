"""The Transformer Engine stand-ins' layers and attributes against plain float64 autograd."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.pytorch.optimizers import (  # noqa: E402
    FusedAdam,
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
        te.LayerNormMLP(4, 4, fuse_wgrad_accumulation=True)
    with pytest.raises(NotImplementedError, match="--fp8_format"), te.fp8_autocast(enabled=True):
        pass
    from transformer_engine.pytorch import router

    with pytest.raises(NotImplementedError, match="--moe_router_fusion false"):
        router.fused_moe_aux_loss()
    with te.fp8_autocast(enabled=False), te.fp8_model_init(enabled=False):
        pass
