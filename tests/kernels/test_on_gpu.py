"""What only a GPU can say: offsets beyond 2^31, accuracy at the real size, a device that is not the current one.

The first two also run at tiny sizes without a GPU, so that the tests themselves are tested there.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from megatron_bvpo.kernels import target_logps, torch_logprob
from megatron_bvpo.kernels.reference import reference_logps

from .cases import DEVICE, relative_per_token

GPU = DEVICE == "cuda"
BF16 = torch.bfloat16
PATHS = ["triton" if GPU else "torch", "fused"]
STRATA = [(0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 0.9999), (0.9999, 1.0)]


def real_case(n: int, hidden: int, vocab: int):
    """(hidden, weight, targets, upstream) in bf16, with 1 - p of the targets spread in logarithm from 1e-6 to 1.

    Logits of other words are about N(0, 2²): the target needs about log(vocab) + 2 + log(p / (1 - p)).
    """
    g = torch.Generator(DEVICE).manual_seed(5)
    weight = torch.randn(vocab, hidden, generator=g, device=DEVICE) * (2 / hidden**0.5)
    targets = torch.randint(0, vocab, (n,), generator=g, device=DEVICE)
    x = torch.randn(n, hidden, generator=g, device=DEVICE)
    others = torch.logspace(-6, -0.05, n, device=DEVICE)
    wanted = torch.log(torch.tensor(float(vocab))).item() + 2 + torch.log((1 - others) / others)
    rows = weight[targets]
    x += ((wanted - (x * rows).sum(1)) / rows.square().sum(1))[:, None] * rows
    return x.to(BF16), weight.to(BF16), targets, torch.randn(n, generator=g, device=DEVICE)


def run(case, impl: str, frozen: bool):
    x, weight, targets, upstream = case
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    logps = target_logps(x, weight, targets, impl=impl)
    logps.backward(upstream)
    return logps.detach(), x.grad


def truth_of(case):
    """float64, 128 tokens at a time: 152k words of 1,024 tokens would be 1.2 GB, and autograd keeps several."""
    x, weight, targets, upstream = case
    wide = weight.double()
    logps, grads = [], []
    for part in torch.arange(x.shape[0], device=x.device).split(128):
        hidden = x[part].double().requires_grad_()
        found = reference_logps(hidden, wide, targets[part])
        grads.append(torch.autograd.grad(found, hidden, upstream[part].double())[0])
        logps.append(found.detach())
    return torch.cat(logps), torch.cat(grads)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_accuracy_stratified_at_the_real_size(record_property, frozen, impl):
    case = real_case(*((1024, 4096, 151_936) if GPU else (300, 96, 1500)))
    truth, true_grad = truth_of(case)
    logps, grad = run(case, impl, frozen)
    with torch.no_grad():  # policy and reference agree to the last bit where their weights do
        assert impl != "fused" or torch.equal(target_logps(*case[:3], impl=impl), logps)
    p = truth.exp()
    for low, high in STRATA:
        inside = (p >= low) & (p < high)
        assert inside.sum() >= 10, f"{inside.sum()} tokens with p from {low} to {high}"
        dx = relative_per_token(grad, true_grad)[inside]
        error = (logps - truth)[inside].abs().max().item()
        record_property(f"p {low}-{high}", f"{inside.sum()} tokens, logp {error:.1e}, dX {dx.median().item():.1e}")
        assert error <= 2e-3
        assert dx.median() <= 5e-3


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_offsets_beyond_2_31(frozen, impl):
    """One tile of more than 2^31 logits (9.3 GB): its last rows are as right as its first."""
    n, hidden, vocab = (15_360, 64, 151_936) if GPU else (64, 16, 300)
    assert not GPU or n * vocab > 2**31
    case = real_case(n, hidden, vocab)
    x, weight, targets, upstream = case
    x, weight = x.requires_grad_(), weight.requires_grad_(not frozen)
    logps = target_logps(x, weight, targets, block_tokens=n, tile_vocab=vocab, impl=impl)
    logps.backward(upstream)
    for part in (slice(0, 32), slice(n - 32, n)):
        truth, true_grad = truth_of(tuple(t.detach()[part] if t is not weight else t.detach() for t in case))
        assert (logps[part] - truth).abs().max() <= 2e-3
        assert relative_per_token(x.grad[part], true_grad).median() <= 1e-2
    assert x.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_another_current_device(frozen, impl):
    case = real_case(64, 96, 1500)
    logps, grad = run(case, impl, frozen)
    there = tuple(t.detach().to("cuda:1") for t in case)
    assert torch.cuda.current_device() == 0
    other_logps, other_grad = run(there, impl, frozen)
    assert torch.equal(other_logps.cpu(), logps.cpu()) and torch.equal(other_grad.cpu(), grad.cpu())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_passes_run_on_the_device_of_their_tensors(monkeypatch, frozen):
    """Without two GPUs: every pass over a tile is entered under the guard that a second device needs."""
    from megatron_bvpo.kernels import autograd

    inside = []

    @contextmanager
    def guard(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    seen = []
    for name in ("target_logits", "sum_exp", "finish_gradient", "grad_logits"):
        original = getattr(torch_logprob, name)

        def watched(*args, original=original, name=name, **kwargs):
            seen.append((name, len(inside)))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch_logprob, name, watched)
    monkeypatch.setattr(autograd, "on_device_of", guard)
    run(real_case(20, 16, 90), "torch", frozen)
    expected = {"target_logits", "sum_exp", "finish_gradient" if frozen else "grad_logits"}
    assert {name for name, _ in seen} == expected and all(depth == 1 for _, depth in seen)
