"""The stand-ins for what GPU configurations fuse: weight gradients added in place, MoE permutations."""

import subprocess
import sys

import pytest
import torch

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

import fused_weight_gradient_mlp_cuda as apex_kernels  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.pytorch import permutation  # noqa: E402

F64 = torch.float64
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------- weight gradients in main_grad

LAYERS = {
    "Linear": lambda **kw: te.Linear(7, 5, **kw),
    "LayerNormLinear": lambda **kw: te.LayerNormLinear(7, 5, normalization="RMSNorm", **kw),
    "GroupedLinear": lambda **kw: te.GroupedLinear(3, 7, 5, **kw),
}
CALLS = {"GroupedLinear": dict(m_splits=[4, 0, 2])}


def pair(layer: str, dtype=F64, **more):
    """Two copies of a layer, the second one fused, with main_grad on its weights as Megatron's DDP puts it there."""
    plain = LAYERS[layer](params_dtype=dtype)
    fused = LAYERS[layer](params_dtype=dtype, fuse_wgrad_accumulation=True)
    fused.load_state_dict(plain.state_dict())
    for name, param in fused.named_parameters():
        param.main_grad = torch.full(param.shape, 10.0, dtype=torch.promote_types(dtype, torch.float32))
        param.grad_added_to_main_grad = False
        for key, value in more.items():
            if name.startswith("weight"):
                setattr(param, key, value)
    return plain, fused


def backward(layer: str, module, inp, first=None):
    x = inp.clone().requires_grad_()
    out = module(x, is_first_microbatch=first, **CALLS.get(layer, {}))
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad


def weights(module):
    return {name: p for name, p in module.named_parameters() if name.startswith("weight")}


@pytest.mark.parametrize("first, overwrite", [(None, False), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_gradients_go_to_main_grad_and_all_else_is_as_ever(layer, first, overwrite):
    plain, fused = pair(layer, **({"overwrite_main_grad": True} if overwrite else {}))
    inp = torch.randn(6, 7, dtype=F64)
    expected, found = backward(layer, plain, inp), backward(layer, fused, inp, first)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    before = 0.0 if first or overwrite else 10.0
    for name, param in plain.named_parameters():
        other = fused.get_parameter(name)
        if name.startswith("weight"):
            torch.testing.assert_close(other.main_grad, before + param.grad, rtol=1e-12, atol=1e-12)
            assert other.grad_added_to_main_grad and other.grad.isnan().all()
        else:
            torch.testing.assert_close(other.grad, param.grad, rtol=1e-12, atol=1e-12)
            assert not other.grad_added_to_main_grad and (other.main_grad == 10).all()


@pytest.mark.parametrize("first, left", [(False, 10.0), (True, 0.0)])
def test_an_expert_without_tokens_keeps_its_main_grad_or_zeroes_it(first, left):
    _, fused = pair("GroupedLinear")
    backward("GroupedLinear", fused, torch.randn(6, 7, dtype=F64), first)
    assert (fused.weight1.main_grad == left).all() and fused.weight1.grad_added_to_main_grad


def test_a_rank_without_tokens_runs_through_its_experts_all_the_same():
    """DDP's hooks hang on these gradients: without them the other ranks wait."""
    _, fused = pair("GroupedLinear")
    x = torch.randn(0, 7, dtype=F64, requires_grad=True)
    out = fused(x, [0, 0, 0])
    assert out.shape == (0, 5)
    out.sum().backward()
    for name, weight in weights(fused).items():
        assert weight.grad is not None and (weight.main_grad == 10).all(), name


def test_dummies_are_zero_where_others_add_theirs_to_them():
    _, fused = pair("Linear", zero_out_wgrad=True)
    backward("Linear", fused, torch.randn(6, 7, dtype=F64))
    assert (fused.weight.grad == 0).all()


def test_without_megatrons_mark_there_is_no_gradient_at_all():
    _, fused = pair("Linear")
    del fused.weight.grad_added_to_main_grad
    backward("Linear", fused, torch.randn(6, 7, dtype=F64))
    assert fused.weight.grad is None and (fused.weight.main_grad != 10).all()


def test_frozen_weights_need_no_main_grad():
    module = te.Linear(7, 5, params_dtype=F64, fuse_wgrad_accumulation=True)
    module.weight.requires_grad_(False)
    _, grad = backward("Linear", module, torch.randn(6, 7, dtype=F64))
    assert grad is not None and module.weight.grad is None


def test_bf16_products_are_added_in_float32():
    """One rounding, of the sum in float32: 256 products of bf16 numbers, exact in float64."""
    plain, fused = pair("Linear", BF16)
    inp = torch.randn(256, 7).bfloat16()
    out, _ = backward("Linear", fused, inp)
    grad = torch.linspace(-1, 1, out.numel(), dtype=BF16).view_as(out).double()
    exact = 10 + grad.t() @ inp.double()
    error = (fused.weight.main_grad.double() - exact).abs().max()
    assert error <= 256 * torch.finfo(torch.float32).eps * (grad.abs().t() @ inp.double().abs()).max()


@pytest.mark.parametrize("dtype, kernel", [(torch.float32, "wgrad_gemm_accum_fp32"), (BF16, "wgrad_gemm_accum_fp16")])
def test_apexs_kernels_add_to_the_gradient(dtype, kernel):
    x, dy = torch.randn(2, 3, 7).to(dtype), torch.randn(2, 3, 5).to(dtype)
    grad = torch.ones(5, 7, dtype=dtype)
    getattr(apex_kernels, kernel)(x, dy, grad)
    exact = 1 + torch.einsum("abo,abi->oi", dy.double(), x.double())
    torch.testing.assert_close(grad.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    other = "wgrad_gemm_accum_fp16" if dtype == torch.float32 else "wgrad_gemm_accum_fp32"
    with pytest.raises(TypeError, match=other):
        getattr(apex_kernels, other)(x, dy, grad)


def test_megatrons_own_layers_add_to_the_gradient():
    """`--bvpo_logp_impl te` takes the logits from such a layer."""
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

    results = []
    for fused in (False, True):
        torch.manual_seed(2)
        x, weight = torch.randn(3, 2, 7).requires_grad_(), torch.randn(5, 7).requires_grad_()
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(5, 7), False
        out = linear(x, weight, None, fused, allreduce_dgrad=False, sequence_parallel=False)
        out.backward(torch.randn_like(out))
        assert weight.grad_added_to_main_grad == bool(weight.grad.isnan().all()) == fused
        results.append((out, x.grad, weight.main_grad if fused else 1 + weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ms_swift_and_megatron_find_them():
    """In a process of its own: both look while they are imported."""
    code = (
        "from megatron_bvpo.rehearsal import install; install()\n"
        "import apex\n"
        "from megatron.core.tensor_parallel import layers\n"
        "assert layers._grad_accum_fusion_available and layers.HAVE_TE\n"
        "assert layers.get_dummy_wgrad([2, 3], layers.torch.float32).isnan().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ------------------------------------------------------------------------------------------- permutations

TOKENS, EXPERTS, HIDDEN, TOPK = 11, 5, 6, 2


def routing(dtype=F64):
    """Expert 3 gets no token."""
    logits = torch.randn(TOKENS, EXPERTS)
    logits[:, 3] = -99
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, logits.topk(TOPK).indices, True)
    probs = (torch.rand(TOKENS, EXPERTS) + 0.1).to(dtype).masked_fill(~chosen, 0)
    return chosen, probs


def there_and_back(fused: bool, with_probs: bool, merging: bool, dtype=F64):
    """Megatron's own two functions, with and without the fused calls; everything they give and its gradients."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    torch.manual_seed(1)
    chosen, probs = routing()
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype).requires_grad_()
    probs = probs.requires_grad_()
    rows, row_probs, mapping, *_ = permute(  # newer megatron-core gives two more
        x, chosen, probs=probs if with_probs else None, num_out_tokens=TOKENS * TOPK, fused=fused
    )
    experts = rows * torch.arange(1, TOKENS * TOPK + 1).to(dtype).unsqueeze(1)
    if with_probs:
        experts = experts * row_probs.unsqueeze(1).to(dtype)
    back = unpermute(experts, mapping, x.shape, probs=probs if merging else None, routing_map=chosen, fused=fused)
    back.backward(torch.linspace(-1, 1, back.numel(), dtype=dtype).view_as(back))
    return [t for t in (rows, row_probs, back, x.grad, probs.grad) if t is not None]


@pytest.fixture(scope="module")
def megatron():
    """The real functions. HAVE_TE there was decided when they were first imported, in this process with stand-ins."""
    from megatron.core.transformer.moe import moe_utils

    assert moe_utils.fused_permute is permutation.moe_permute
    return moe_utils


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("with_probs", [False, True])
def test_permutations_are_megatrons_own(megatron, with_probs, merging):
    found, expected = there_and_back(True, with_probs, merging), there_and_back(False, with_probs, merging)
    assert len(found) == len(expected) >= 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sorted_chunks_are_megatrons_own(megatron):
    sizes, order = torch.tensor([3, 0, 2, 4]), torch.tensor([2, 0, 3, 1])
    results = []
    for fused in (True, False):
        x = torch.arange(9 * HIDDEN, dtype=F64).view(9, HIDDEN).requires_grad_()
        probs = torch.arange(9, dtype=F64).requires_grad_()
        rows, row_probs = megatron.sort_chunks_by_idxs(x, sizes, order, probs=probs, fused=fused)
        alone, none = megatron.sort_chunks_by_idxs(x, sizes, order, fused=fused)
        assert none is None and torch.equal(alone, rows)
        weight = torch.arange(9, dtype=F64)
        ((rows.sum(1) + row_probs) * weight).sum().backward()
        results.append((rows, row_probs, x.grad, probs.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_rank_without_tokens_sorts_no_chunks(megatron):
    x, probs = torch.empty(0, HIDDEN, requires_grad=True), torch.empty(0, requires_grad=True)
    sizes = torch.zeros(4, dtype=torch.long)
    rows, row_probs = megatron.sort_chunks_by_idxs(x, sizes, torch.arange(4), probs=probs, fused=True)
    (rows.sum() + row_probs.sum()).backward()
    assert rows.shape == (0, HIDDEN) and row_probs.shape == (0,) and x.grad.shape == (0, HIDDEN)


def test_the_map_of_rows_is_laid_out_as_transformer_engines():
    """Its own example, from the comments of its make_row_id_map; what it leaves undefined is -1 here."""
    chosen = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    _, found = permutation.moe_permute(torch.ones(5, 1), chosen, 7)
    u = -1
    assert found.tolist() == [
        [3, 0, u, 1, 0, u, 2],
        [5, 1, u, 2, 0, u, 2],
        [6, u, u, 2, u, u, 1],
        [4, 2, u, 1, 0, u, 2],
        [u, u, u, u, u, u, 0],
    ]
    assert found.dtype == torch.int32


def test_sums_over_experts_are_rounded_once():
    """In bf16 256 + 1 is 256: one after the other these give 512, whichever comes first. Forward and backward."""
    values = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0], [256.0]]).bfloat16()
    x = torch.ones(1, 1, dtype=BF16, requires_grad=True)
    rows, mapping = permutation.moe_permute(x, torch.ones(1, 6, dtype=torch.bool), 6)
    rows.backward(values)
    assert x.grad.item() == 516
    assert permutation.moe_unpermute(values, mapping, restore_shape=(1, 1)).item() == 516


def test_a_probability_of_zero_is_padding():
    chosen, probs = routing()
    probs = probs.clone()
    token, expert = chosen.nonzero()[4].tolist()
    probs[token, expert] = 0
    x = torch.randn(TOKENS, HIDDEN, dtype=F64, requires_grad=True)
    rows, row_probs, _ = permutation.moe_permute_with_probs(x, probs, chosen, TOKENS * TOPK)
    assert (rows[row_probs == 0] == 0).all() and (row_probs == 0).sum() == 1
    rows.sum().backward()
    assert (x.grad == TOPK).all()


def test_what_transformer_engine_cannot_do_is_not_done_here():
    """A map that sends nothing: `--moe_token_dispatcher_type allgather` asks for it on a rank without tokens."""
    x = torch.ones(3, 2)
    with pytest.raises(AssertionError, match="num_out_tokens > 0, got 0"):
        permutation.moe_permute(x, torch.zeros(3, 4), torch.tensor(0))
    with pytest.raises(ValueError, match="names 3 rows, but there are 4"):
        permutation.moe_permute(x, torch.eye(3), 4)
    nothing, mapping = permutation.moe_permute(x[:0], torch.zeros(0, 4), 0)
    assert permutation.moe_unpermute(nothing, mapping, restore_shape=(3, 2)).shape == (0, 2)
    with pytest.raises(NotImplementedError, match="map_type='index'"):
        permutation.moe_permute(x, torch.zeros(3, 2), 6, map_type="index")
