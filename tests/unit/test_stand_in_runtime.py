"""The stand-ins' optimizers against torch's, their random states, and how they are installed."""

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
        # A sum of squares, so nothing cancels: four roundings a step, by eps / 2 each, over seven steps.
        found, exact = adam.state[a]["exp_avg_sq"].double(), reference.state[b]["exp_avg_sq"]
        torch.testing.assert_close(found, exact, rtol=14 * torch.finfo(torch.float32).eps, atol=0)
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
    tensors = [torch.randn(3, 4), torch.randn(1_000_000)]
    norm, each = multi_tensor_applier(multi_tensor_l2norm, noop, [tensors], True)
    assert norm.dtype == each.dtype == torch.float32
    # As good as float32 can say it, however many there are: one rounding of the result.
    exact = torch.stack([t.double().norm() for t in tensors])
    one = {"rtol": torch.finfo(torch.float32).eps, "atol": 0}
    torch.testing.assert_close(norm.double(), exact.norm().reshape(1), **one)
    torch.testing.assert_close(each.double(), exact, **one)
    out = [torch.empty(3, 4), torch.empty(1_000_000)]
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
class Batch(list):
    def pin_memory(self):
        return ['pinned', *self]
for workers in (0, 1):
    loader = torch.utils.data.DataLoader([1, 2], collate_fn=Batch, num_workers=workers, pin_memory=True)
    assert list(loader) == [['pinned', 1], ['pinned', 2]]
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
