"""What target_logps accepts, refuses and costs."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bvpo.kernels import target_logps, vocabulary_shard
from megatron_bvpo.kernels.tile_sizes import GIB, choose_tiles, cuda_tiles
from megatron_bvpo.kernels.torch_logprob import MAX_ROWS, MAX_TOKENS

from .cases import random_case, run
from .error_bounds import allowed, in_units


class Work(TorchDispatchMode):
    """Counts multiply-adds of matrix products, and the elements of the largest tensor made."""

    multiply_adds, largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def products(case, *, grad=True, frozen=True) -> float:
    """Matrix products, in units of N·H·V multiply-adds over the tokens that count."""
    kept = int((case.targets_N != -100).sum())
    with Work() as work, torch.set_grad_enabled(grad):
        hidden = case.hidden_NH.clone().requires_grad_()
        logps = target_logps(hidden, case.weight_VH.clone().requires_grad_(not frozen), case.targets_N)
        if grad:
            logps.sum().backward()
    return work.multiply_adds / (kept * case.weight_VH.numel())


@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_products(ignored):
    case = random_case(50, 16, 300, ignored=ignored)
    assert products(case, grad=False) == 1
    assert products(case, frozen=True) == 2
    assert products(case, frozen=False) == 4


def test_largest_tensor_is_a_tile():
    case = random_case(200, 4, 5000)
    for frozen in (True, False):
        with Work() as work:
            run(case, frozen=frozen, block_tokens=64, tile_vocab=256)
        assert work.largest <= max(64 * 256, case.weight_VH.numel())


def test_non_contiguous_inputs():
    case = random_case(20, 12, 50)
    bounds_of = {impl: allowed(case, partial(run, frozen=False, impl=impl)) for impl in ("torch", "triton", "fused")}
    case.hidden_NH = torch.stack([case.hidden_NH, case.hidden_NH], 2)[..., 0]
    case.weight_VH = case.weight_VH.T.contiguous().T
    case.targets_N = torch.stack([case.targets_N, case.targets_N], 1)[:, 1]
    assert not case.hidden_NH.is_contiguous() and not case.weight_VH.is_contiguous()
    for impl, bounds in bounds_of.items():
        if impl == "fused":  # TMA wants the head's rows contiguous; hidden states are copied if need be
            case.weight_VH = case.weight_VH.contiguous()
        for frozen in (True, False):
            hidden = case.hidden_NH.detach().requires_grad_()
            weight = case.weight_VH.detach().requires_grad_(not frozen)
            logps = target_logps(hidden, weight, case.targets_N, impl=impl)
            logps.backward(case.upstream_N.repeat_interleave(2)[::2])
            errors = in_units(case, (logps.detach(), hidden.grad, weight.grad))
            # A frozen head has no third error.
            assert all(e <= b for e, b in zip(errors, bounds, strict=not frozen)), (impl, frozen, errors, bounds)


def test_expanded_upstream_and_int32_targets():
    case = random_case(9, 12, 50)
    hidden = case.hidden_NH.clone().requires_grad_()
    logps = target_logps(hidden, case.weight_VH, case.targets_N.int())
    logps.sum().backward()  # an expanded gradient of 1
    case.upstream_N = torch.ones_like(case.upstream_N)
    errors, bounds = in_units(case, (logps.detach(), hidden.grad, None)), allowed(case, run)
    assert errors[0] <= bounds[0] and errors[1] <= bounds[1], (errors, bounds)


def test_autocast_casts_the_factors_and_nothing_else():
    case = random_case(20, 12, 50)
    hidden = case.hidden_NH.clone().requires_grad_()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        logps = target_logps(hidden, case.weight_VH, case.targets_N)
        logps.backward(case.upstream_N)
    case.hidden_NH, case.weight_VH = case.hidden_NH.bfloat16(), case.weight_VH.bfloat16()
    true_logps, true_grad, _ = run(case)  # bit for bit: the float32 products inside stay float32
    assert torch.equal(logps.detach(), true_logps) and torch.equal(hidden.grad, true_grad.float())
    assert logps.dtype == hidden.grad.dtype == torch.float32


def test_compiled_callers_get_the_same_numbers():
    """torch.compile leaves it alone: traced, its launches and its device synchronisation would be wrong or slow."""
    case = random_case(20, 16, 60, ignored=0.0)
    traced = []

    def backend(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    compiled = torch.compile(lambda x, w, t: 2 * target_logps(x * 1.0, w, t), backend=backend)
    assert torch.equal(compiled(case.hidden_NH, case.weight_VH, case.targets_N), 2 * run(case)[0])
    assert len(traced) == 2 and all("mul" in name for name in traced), traced


class OnGpu:
    """As much of a tensor on a GPU as the guards look at."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype = dtype


def test_old_torch_and_float16_are_told(monkeypatch):
    from megatron_bvpo.kernels import logprob

    with pytest.warns(UserWarning, match="about twelve times slower"):
        logprob.check_products(OnGpu(torch.float16))
    logprob.check_products(OnGpu(torch.bfloat16))
    monkeypatch.setattr(logprob, "TORCH", (2, 7))
    logprob.check_products(OnGpu(torch.float32))
    with pytest.raises(RuntimeError, match="needs torch 2.8 or newer"):
        logprob.check_products(OnGpu(torch.bfloat16))


def test_a_shard_of_another_weight_is_refused():
    case = random_case(6, 8, 30, ignored=0.0)
    shard = vocabulary_shard(case.weight_VH, case.targets_N)
    assert torch.equal(run(case, shard=shard)[0], run(case)[0])
    for weight, size in ((case.weight_VH[:29], None), (case.weight_VH, 28)):
        with pytest.raises(ValueError, match="take a new one from vocabulary_shard"):
            target_logps(case.hidden_NH, weight, case.targets_N.clamp(max=20), shard=shard, vocab_size=size)


def test_double_backward_is_refused():
    case = random_case(3, 4, 9)
    for frozen in (True, False):
        hidden = case.hidden_NH.clone().requires_grad_()
        weight = case.weight_VH.clone().requires_grad_(not frozen)
        logps = target_logps(hidden, weight, case.targets_N)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(logps.sum(), hidden, create_graph=True)


def test_head_with_lora_is_refused():
    class LoraLinear(torch.nn.Linear):
        pass

    case = random_case(3, 4, 9)
    with pytest.raises(TypeError, match=r"LoraLinear.*LoRA.*refused.*output_layer"):
        target_logps(case.hidden_NH, LoraLinear(4, 9), case.targets_N)


HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(9, 4), torch.tensor([0, 8, -100])


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((HIDDEN[None], WEIGHT, TARGETS), {}, ValueError, r"\(1, 3, 4\), \(9, 4\) and \(3,\)"),
        ((HIDDEN, torch.zeros(9, 5), TARGETS), {}, ValueError, "hidden size 4 and weight_VH 5"),
        ((HIDDEN, WEIGHT, TARGETS[:2]), {}, ValueError, "2 targets for 3 hidden states"),
        ((HIDDEN, WEIGHT.bfloat16(), TARGETS), {}, ValueError, "torch.float32 and weight_VH torch.bfloat16"),
        ((HIDDEN, WEIGHT.to("meta"), TARGETS), {}, ValueError, "on cpu, weight_VH on meta"),
        ((HIDDEN, WEIGHT.int(), TARGETS), {}, TypeError, "weight_VH is torch.int32"),
        ((HIDDEN, WEIGHT, TARGETS.float()), {}, TypeError, "targets_N is torch.float32"),
        ((HIDDEN, WEIGHT, [0, 1, 2]), {}, TypeError, "targets_N must be a plain torch.Tensor, got list"),
        ((HIDDEN, WEIGHT, TARGETS + 1), {}, ValueError, "range from -99 to 9, expected 0 to 8"),
        ((HIDDEN, WEIGHT, TARGETS), {"vocab_size": 8}, ValueError, "to 8, expected 0 to 7"),
        ((HIDDEN, WEIGHT, TARGETS), {"vocab_size": 10}, ValueError, "vocab_size is 10, .* 9 rows"),
        ((HIDDEN, WEIGHT, TARGETS), {"impl": "cuda"}, ValueError, "impl 'cuda', expected one of"),
        ((HIDDEN, WEIGHT, TARGETS), {"temperature": 0.0}, ValueError, "temperature is 0.0, expected a number from"),
        ((HIDDEN, WEIGHT, TARGETS), {"temperature": float("nan")}, ValueError, "temperature is nan"),
        ((HIDDEN, WEIGHT, TARGETS), {"block_tokens": 0}, ValueError, "block_tokens is 0"),
        ((HIDDEN.double(), WEIGHT.double(), TARGETS), {"impl": "triton"}, ValueError, "not torch.float64"),
    ],
)
def test_errors_name_both_values(args, options, error, message):
    with pytest.raises(error, match=message):
        target_logps(*args, **options)


def test_triton_on_cpu_without_the_interpreter_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="hidden_NH is on cpu"):
        target_logps(HIDDEN, WEIGHT, TARGETS, impl="triton")
    target_logps(HIDDEN, WEIGHT, TARGETS, impl="auto")


def test_importing_needs_neither_triton_nor_the_host():
    code = (
        "import sys, megatron_bvpo.kernels as k; bad = {'triton', 'megatron', 'swift', 'transformer_engine'};"
        "print(sorted(bad & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("rows", [0, 1, 507, 18_992, 151_936])
@pytest.mark.parametrize("budget", [2**22, GIB // 8, GIB])
def test_cuda_tiles_fit_their_budget(rows, budget):
    for tokens in (1, 4096, 131_072):
        for with_products in (True, False):
            fused_block, fused_tile, *_ = cuda_tiles(budget, tokens, rows, with_products=True, fused=True)
            assert 2 * fused_block * fused_tile <= max(budget, 2 * 128 * 512)
            block, tile, backward_block, backward_tile = cuda_tiles(budget, tokens, rows, with_products=with_products)
            assert min(block, tile, backward_block, backward_tile) >= 1
            floor = 6 * 8192 * 512  # tiles never get smaller than this, however little is free
            assert block * min(tile, max(rows, 1)) * (6 if with_products else 4) <= max(budget, floor)
            assert backward_block * backward_tile * 6 <= max(budget, floor)


def test_budgets_of_nothing_are_refused():
    with pytest.raises(ValueError, match="budget_bytes is 0, expected at least 1"):
        target_logps(HIDDEN, WEIGHT, TARGETS, budget_bytes=0)


def test_overflowed_tokens_take_little_memory():
    """Every token far below -80: none of their products is larger than a fixed size."""
    case = random_case(300, 8, 20_000, spread=300.0, ignored=0.0)
    with Work() as work, torch.no_grad():
        logps = target_logps(case.hidden_NH, case.weight_VH, case.targets_N, block_tokens=300, tile_vocab=256)
    assert (logps < -90).float().mean() > 0.9
    assert work.largest <= MAX_TOKENS * MAX_ROWS


def test_given_tile_sizes_win():
    sizes = choose_tiles(torch.device("cpu"), 10, 100, with_products=True, block_tokens=3, tile_vocab=5)
    assert set(sizes.values()) == {3, 5}
