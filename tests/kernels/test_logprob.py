"""target_logps against float64: values, gradients, precision near p = 1, and everything at the edges."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_bvpo.kernels import target_logps
from megatron_bvpo.kernels.reference import reference_logps

from .cases import (
    DEVICE,
    Case,
    case_on,
    expected,
    plain_torch,
    random_case,
    relative,
    relative_per_token,
    run,
)
from .error_bounds import allowed, in_units

F32, BF16 = torch.float32, torch.bfloat16
AWKWARD = [(1, 1, 1), (1, 7, 252), (7, 33, 507), (40, 252, 123), (23, 64, 1009), (3, 507, 7)]
IMPLS = ["torch", "triton", "fused"]  # fused: rows of 16 bytes, so a hidden size of whole eights
BF16_EPS = torch.finfo(BF16).eps
# bf16: one unit in the last place. With a single token the rounding of its one factor is the whole error.
GRAD_BOUND = {F32: 1e-5, BF16: BF16_EPS}


def logp_bound(dtype, truth: torch.Tensor) -> float:
    """1e-5 in float32 (2e-3 for bf16), and for the very improbable a few units in the last place of logp.

    In float32 that is one or two roundings of the largest x·W: eps Σ|x W| is at most 7e-6 in AWKWARD. A logp moves by
    the difference of two logits' errors, which are a third of that in any order of the sums.
    """
    return (1e-5 if dtype == F32 else 2e-3) * max(1.0, truth.abs().max().item() / 40)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_awkward_sizes(shape, impl, dtype, frozen):
    n, h, v = shape if impl != "fused" else (shape[0], -(-shape[1] // 8) * 8, shape[2])
    case = random_case(n, h, v, dtype, padding=5, ignored=0.2 if n > 1 else 0.0)
    logps, grad_hidden, grad_weight = run(case, frozen=frozen, impl=impl, block_tokens=16, tile_vocab=200)
    truth, true_hidden, true_weight = expected(case)
    assert logps.dtype == torch.float32
    assert (logps - truth).abs().max() <= logp_bound(dtype, truth)
    assert relative(grad_hidden, true_hidden) <= GRAD_BOUND[dtype]
    if frozen:
        assert grad_weight is None
    else:
        assert relative(grad_weight, true_weight) <= GRAD_BOUND[dtype]
        assert not grad_weight[shape[2] :].any()  # padding


@pytest.mark.parametrize("columns", [64, 252, 1009])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_triton_rows_of_several_blocks(monkeypatch, gpu_rounding, columns, frozen):
    """Whole blocks of a row take another branch than its end: small blocks make both, at affordable sizes."""
    from megatron_bvpo.kernels import triton_logprob

    monkeypatch.setattr(triton_logprob, "PASS_BLOCK", 64)
    for dtype in (F32, BF16):
        case = random_case(30, 12, columns, dtype, spread=2.0)
        results = run(case, frozen=frozen, impl="triton", tile_vocab=600)
        for value, truth in zip(results, expected(case), strict=True):
            assert value is None or relative(value, truth) <= GRAD_BOUND[dtype]


CASES = st.fixed_dictionaries(
    dict(
        n=st.integers(1, 40),
        h=st.integers(1, 70),
        v=st.integers(1, 600),
        seed=st.integers(0, 10**6),
        spread=st.sampled_from([0.1, 1.0, 4.0, 8.0]),
        ignored=st.sampled_from([0.0, 0.3, 0.95]),
        padding=st.sampled_from([0, 1, 17]),
    )
)


@settings(max_examples=220, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kwargs=CASES,
    dtype=st.sampled_from([F32, BF16]),
    frozen=st.booleans(),
    block=st.integers(1, 50),
    tile=st.integers(16, 700),
)
def test_random_cases(kwargs, dtype, frozen, block, tile):
    case = random_case(dtype=dtype, **kwargs)
    logps, grad_hidden, grad_weight = run(case, frozen=frozen, impl="torch", block_tokens=block, tile_vocab=tile)
    check_no_worse_than_plain(case, dtype, logps, grad_hidden, grad_weight)


@example(  # one token between two words that nearly share a row, and a head that is trained
    kwargs=dict(n=1, h=1, v=256, seed=256, spread=4.0, ignored=0.0, padding=0), dtype=BF16, frozen=False, tile=60
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kwargs=CASES, dtype=st.sampled_from([F32, BF16]), frozen=st.booleans(), tile=st.integers(60, 700))
def test_random_cases_in_triton(gpu_rounding, kwargs, dtype, frozen, tile):
    kwargs["n"] = min(kwargs["n"], 8)  # the interpreter takes a row at a time
    case = random_case(dtype=dtype, **kwargs)
    logps, grad_hidden, grad_weight = run(case, frozen=frozen, impl="triton", tile_vocab=tile)
    check_no_worse_than_plain(case, dtype, logps, grad_hidden, grad_weight, rounded=True)


@example(  # one token between two words that nearly share a row
    kwargs=dict(n=1, h=1, v=436, seed=27, spread=8.0, ignored=0.0, padding=0),
    dtype=BF16, frozen=True, block=1, tile=16, small=False,
)  # fmt: skip
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kwargs=CASES,
    dtype=st.sampled_from([F32, BF16]),
    frozen=st.booleans(),
    block=st.integers(1, 50),
    tile=st.integers(16, 700),
    small=st.booleans() if DEVICE == "cpu" else st.just(False),
)
def test_random_cases_fused(gpu_rounding, kwargs, dtype, frozen, block, tile, small):
    kwargs["h"] = -(-kwargs["h"] // 8) * 8
    case = random_case(dtype=dtype, **kwargs)
    options = dict(impl="fused", block_tokens=max(block, kwargs["n"] // 2), tile_vocab=tile)
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several output tiles in both directions and several steps in depth, for the interpreter's sake
            from megatron_bvpo.kernels import fused_logprob

            for name, value in dict(TILE_TOKENS=16, TILE_ROWS=64, TILE_BYTES=64, GROUP=2, SUM_TILES=4).items():
                patch.setattr(fused_logprob, name, value)
        logps, grad_hidden, grad_weight = run(case, frozen=frozen, **options)
    check_no_worse_than_plain(case, dtype, logps, grad_hidden, grad_weight, rounded=True)


def conditioning(case: Case, frozen: bool) -> float:
    """How much larger the rounded terms of dX are than dX: |Σ_{v≠t} p_v |W_v| · upstream| / |dX|, in float64.

    With a trainable head the target's term, (1 - p_t) W_t, is rounded too.
    """
    weight = case.weight_VH[: case.vocab_size].double()
    probs = torch.softmax(case.hidden_NH.double() @ weight.T, dim=1)
    kept = case.targets_N != -100
    target_N1 = case.targets_N.clamp(min=0)[:, None]
    at_target_N1 = torch.zeros_like(probs[:, :1]) if frozen else 1 - probs.gather(1, target_N1)
    probs = probs.scatter(1, target_N1, at_target_N1) * kept[:, None]
    terms = (probs @ weight.abs()) * case.upstream_N.double().abs()[:, None]
    size = expected(case)[1].norm().item()
    return terms.norm().item() / size if size else 0.0


def check_no_worse_than_plain(case, dtype, logps, grad_hidden, grad_weight, rounded: bool = False):
    """At most twice the error of plain torch, or the bound of the dtype where that happens to be exact.

    `rounded`: every exponential (of a trainable head: every gradient of a logit) is rounded to bf16, by eps / 2 of its
    term at most, before the terms are added.
    """
    truth, true_hidden, true_weight = expected(case)
    plain_logps, plain_hidden, plain_weight = plain_torch(case)
    plain_error = (plain_logps - truth).abs().max().item()
    assert (logps - truth).abs().max() <= max(2 * plain_error, logp_bound(dtype, truth))
    floor = GRAD_BOUND[dtype]
    terms = BF16_EPS / 2 * conditioning(case, frozen=grad_weight is None) if rounded and dtype == BF16 else 0.0
    assert relative(grad_hidden, true_hidden) <= max(2 * relative(plain_hidden, true_hidden), floor + terms)
    if grad_weight is not None:
        assert relative(grad_weight, true_weight) <= max(2 * relative(plain_weight, true_weight), floor)


STRATA = [(0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 0.9999), (0.9999, 1.0)]


def stratified_case(dtype, n=300, h=96, v=1500) -> tuple[Case, torch.Tensor]:
    """Targets with 1 - p spread evenly in logarithm from 1e-6 to 1; (case, p in float64)."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(v, h, generator=g) * 0.3
    targets = torch.randint(0, v, (n,), generator=g)
    noise = torch.randn(n, h, generator=g)
    wanted = torch.logspace(-6, -0.05, n, dtype=torch.float64)  # 1 - p
    low, high = torch.full((n, 1), -20.0), torch.full((n, 1), 20.0)
    for _ in range(40):
        middle = (low + high) / 2
        hidden = noise + middle * weight[targets]
        too_low = -torch.expm1(reference_logps(hidden, weight, targets)) > wanted
        low = torch.where(too_low[:, None], middle, low)
        high = torch.where(too_low[:, None], high, middle)
    case = case_on(DEVICE, dtype, hidden, weight, targets, torch.randn(n, generator=g))
    return case, expected(case)[0].exp()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("impl", IMPLS)
def test_precision_by_probability(gpu_rounding, impl, frozen):
    case, p = stratified_case(BF16)
    truth, true_hidden, _ = expected(case)
    logps, grad_hidden, _ = run(case, frozen=frozen, impl=impl)
    plain_logps, plain_hidden, _ = plain_torch(case)
    ours, plain = (relative_per_token(grad, true_hidden) for grad in (grad_hidden, plain_hidden))
    for low, high in STRATA:
        inside = (p >= low) & (p < high)
        assert inside.sum() >= 10
        error, peer = ours[inside].median().item(), plain[inside].median().item()
        logp_error = (logps - truth)[inside].abs().max().item()
        plain_error = (plain_logps - truth)[inside].abs().max().item()
        print(
            f"p {low}-{high}: {inside.sum()} tokens, dX median relative error {error:.1e} (plain {peer:.1e}),"
            f" logp error {logp_error:.1e} (plain {plain_error:.1e})"
        )
        assert error <= 5e-3
        assert error <= 2 * peer
        assert logp_error <= 2e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_near_certainty(impl):
    """The target is left out, not subtracted: float32 keeps its precision where 1 - p is 1e-6."""
    case, p = stratified_case(F32, n=60)
    truth, true_hidden, _ = expected(case)
    logps, grad_hidden, _ = run(case, impl=impl)
    certain = p > 0.9999
    # Ten roundings of the largest x·W there, each eps Σ|x W| = 5e-6 of every exp(l_v - a).
    assert ((logps - truth) / truth)[certain].abs().max() <= 5e-5  # relative, of a logp near 0
    assert relative_per_token(grad_hidden, true_hidden)[certain].max() <= 5e-5


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, in the interpreter: what is tested
def test_far_below_minus_80(gpu_rounding, impl, dtype, frozen):
    case = random_case(12, 16, 90, dtype, ignored=0.0)
    case.hidden_NH[3:9] *= 40
    truth, true_hidden, true_weight = expected(case)
    assert (truth < -90).sum() >= 3 and (truth > -20).sum() >= 3
    logps, grad_hidden, grad_weight = run(case, impl=impl, frozen=frozen, block_tokens=5, tile_vocab=32)
    assert ((logps - truth) / truth).abs().max() <= (1e-5 if dtype == F32 else 1e-4)
    # Logits of several hundred: float32 knows them to 3e-5, and so their exponentials.
    # bf16 rounds exp(l_v - a), the saved gradient, and that times the upstream one, by eps / 2 each.
    assert relative_per_token(grad_hidden, true_hidden).max() <= (5e-5 if dtype == F32 else 1.5 * BF16_EPS)
    if not frozen:
        # bf16 rounds the gradients of the logits, and dW.
        assert relative(grad_weight, true_weight) <= (5e-5 if dtype == F32 else BF16_EPS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_all_ignored_and_no_tokens(impl, frozen):
    for n in (0, 6):
        case = random_case(n, 8, 30, ignored=1.1)
        logps, grad_hidden, grad_weight = run(case, impl=impl, frozen=frozen)
        assert logps.shape == (n,) and not logps.any()
        assert grad_hidden.shape == (n, 8) and not grad_hidden.any()
        assert frozen or not grad_weight.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_poisoned_memory_is_all_overwritten(impl, frozen, gpu_rounding):
    """Every torch.empty is filled with NaN, so an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # a GPU's scatter_add has no deterministic form
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        for dtype in (F32, BF16):
            for ignored in (0.0, 0.5):
                case = random_case(11, 24, 83, dtype, ignored=ignored, padding=3)
                results = run(case, impl=impl, frozen=frozen, block_tokens=4, tile_vocab=37)
                for value, truth in zip(results, expected(case), strict=True):
                    assert value is None or relative(value, truth) <= GRAD_BOUND[dtype]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_float64_gradcheck(frozen):
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=not frozen)
    targets = torch.tensor([0, 8, -100, 3, 3])
    assert torch.autograd.gradcheck(lambda x, w: target_logps(x, w, targets, vocab_size=9), (hidden, weight))


def test_tied_embeddings():
    """The head's weight is also the embedding: both gradients meet in one parameter."""
    tokens, targets = torch.tensor([1, 5, 5, 0, 12]), torch.tensor([5, 5, 0, 12, -100])
    grads = []
    for logps_of, dtype in ((target_logps, F32), (reference_logps, torch.float64)):
        weight = torch.randn(13, 6, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        logps_of(torch.tanh(weight[tokens]), weight, targets).sum().backward()
        grads.append(weight.grad)
    # Each number is a sum of at most 5 + 6 + 13 others: tokens, hidden units, vocabulary.
    assert relative(grads[0], grads[1]) <= 24 * torch.finfo(F32).eps


def test_backward_twice_and_only_weight():
    case = random_case(6, 8, 40)
    hidden = case.hidden_NH.clone().requires_grad_()
    logps = target_logps(hidden, case.weight_VH, case.targets_N)
    first = torch.autograd.grad(logps, hidden, case.upstream_N, retain_graph=True)[0]
    second = torch.autograd.grad(logps, hidden, case.upstream_N)[0]
    assert torch.equal(first, second)
    weight = case.weight_VH.clone().requires_grad_()
    target_logps(case.hidden_NH, weight, case.targets_N).backward(case.upstream_N)
    logps, grad_hidden, _ = run(case)
    errors, bounds = in_units(case, (logps, grad_hidden, weight.grad)), allowed(case, partial(run, frozen=False))
    assert errors[2] <= bounds[2], (errors, bounds)


def test_logps_of_an_ignored_token_ignore_its_upstream_gradient():
    case = random_case(4, 8, 40, ignored=0.0)
    case.targets_N[1] = -100
    case.upstream_N[1] = math.nan
    for frozen in (True, False):
        _, grad_hidden, _ = run(case, frozen=frozen)
        assert not grad_hidden[1].any() and grad_hidden.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_equals_grad_bit_for_bit(impl):
    """Policy and reference passes must agree where their weights do."""
    case = random_case(70, 40, 507, BF16)
    with torch.no_grad():
        hidden = case.hidden_NH.clone().requires_grad_()
        plain = target_logps(hidden, case.weight_VH, case.targets_N, impl=impl, block_tokens=64, tile_vocab=128)
    assert not plain.requires_grad
    for frozen in (True, False):
        assert torch.equal(plain, run(case, frozen=frozen, impl=impl, block_tokens=64, tile_vocab=128)[0])


def softmax_at(case: Case, temperature: float):
    """(logps, entropies, d hidden, d weight) in float64 by log_softmax, 0 for ignored tokens."""
    hidden = case.hidden_NH.double().requires_grad_()
    weight = case.weight_VH.double().requires_grad_()
    all_logps = torch.log_softmax(hidden @ weight[: case.vocab_size].T / temperature, dim=1)
    kept = case.targets_N != -100
    logps = all_logps.gather(1, case.targets_N.clamp(min=0)[:, None]).squeeze(1) * kept
    entropies = -(all_logps.exp() * all_logps).sum(1) * kept
    grads = torch.autograd.grad(logps, (hidden, weight), case.upstream_N.double())
    return logps.detach(), entropies.detach(), *grads


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # before the token is anchored anew
def test_temperature_and_entropy(gpu_rounding, impl, dtype, temperature, frozen):
    case = random_case(30, 24, 607, dtype, spread=2.0, padding=7)
    case.hidden_NH[3] *= 60  # a token that is anchored at its row's maximum
    case.targets_N[3] = 5
    truth, true_entropy, true_hidden, true_weight = softmax_at(case, temperature)
    assert truth[3] < -90
    hidden = case.hidden_NH.detach().clone().requires_grad_()
    weight = case.weight_VH.detach().clone().requires_grad_(not frozen)
    options = dict(impl=impl, vocab_size=case.vocab_size, temperature=temperature, block_tokens=17, tile_vocab=300)
    logps, entropy = target_logps(hidden, weight, case.targets_N, return_entropy=True, **options)
    assert not entropy.requires_grad
    assert (logps - truth).abs().max() <= logp_bound(dtype, truth)
    assert (entropy - true_entropy).abs().max() <= 1e-5 * true_entropy.max()
    logps.backward(case.upstream_N)
    assert relative(hidden.grad, true_hidden) <= GRAD_BOUND[dtype]
    assert frozen or relative(weight.grad, true_weight) <= GRAD_BOUND[dtype]
    with torch.no_grad():  # the entropy costs logps no digit, nor does its absence
        assert torch.equal(target_logps(hidden, weight, case.targets_N, **options), logps)
