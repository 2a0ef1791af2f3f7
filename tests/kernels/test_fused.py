"""The fused product: what it alone promises. Everything that all paths promise is in test_logprob.py."""

from __future__ import annotations

import pytest
import torch

from megatron_bvpo.kernels import fused_logprob, logprob, target_logps

from .cases import DEVICE, expected, random_case, relative, run

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def small_tiles(monkeypatch):
    """Several output tiles of tokens and of rows, and several for a program, at sizes that the interpreter bears."""
    sizes = dict(TILE_TOKENS=64, TILE_ROWS=64, TILE_BYTES=64, GROUP=2, SUM_TILES=4, SUM_TOKENS=16)
    for name, value in sizes.items():
        monkeypatch.setattr(fused_logprob, name, value)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_tiles_in_both_directions(small_tiles, gpu_rounding, dtype, frozen):
    case = random_case(200, 72, 700, dtype, spread=2.0, padding=9)
    results = run(case, frozen=frozen, impl="fused", block_tokens=150, tile_vocab=300)
    for value, truth in zip(results, expected(case), strict=True):
        assert value is None or relative(value, truth) <= (1e-5 if dtype == F32 else torch.finfo(BF16).eps)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # before tokens are anchored anew
def test_logps_do_not_depend_on_how_the_work_is_cut(small_tiles):
    """With and without products, blocks of tokens, tiles of the vocabulary, ignored tokens, tokens far below -80."""
    case = random_case(130, 40, 507, BF16, ignored=0.3)
    case.hidden_NH[::4] *= 40
    with torch.no_grad():
        once = target_logps(case.hidden_NH, case.weight_VH, case.targets_N, impl="fused")
    for sizes in ({}, dict(block_tokens=33), dict(tile_vocab=64), dict(block_tokens=128, tile_vocab=200)):
        assert torch.equal(run(case, impl="fused", **sizes)[0], once), sizes
    assert (once < -90).sum() > 10
    kept = case.targets_N != -100
    alone = target_logps(case.hidden_NH[kept], case.weight_VH, case.targets_N[kept], impl="fused")
    assert torch.equal(alone, once[kept])


def test_every_output_tile_is_taken_once(small_tiles, monkeypatch):
    """Whatever the number of programs: one, some that do not divide the tiles, one a tile."""
    case = random_case(150, 16, 300, F32, ignored=0.0)
    truth = expected(case)[0]
    if DEVICE == "cuda":
        fused_logprob.programs.cache_clear()
    for programs in (1, 4, 7, 100):
        monkeypatch.setattr(fused_logprob, "programs", lambda device, programs=programs: programs)
        assert (run(case, impl="fused")[0] - truth).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda hidden, weight: (hidden[:, :33], weight[:, :33].contiguous()), "got hidden size 33"),
        (lambda hidden, weight: (hidden, weight.T.contiguous().T), "must lie contiguous"),
    ],
)
def test_tensors_that_tma_cannot_read_are_refused_by_name(change, message):
    case = random_case(10, 40, 90, BF16)
    hidden, weight = change(case.hidden_NH, case.weight_VH)
    with pytest.raises(ValueError, match=f"impl 'fused' cannot run here: .*{message}"):
        target_logps(hidden, weight, case.targets_N, impl="fused")
    assert target_logps(hidden, weight, case.targets_N).isfinite().all()  # "auto" takes another path


def test_hidden_states_that_tma_cannot_read_are_copied():
    case = random_case(10, 40, 90, BF16, ignored=0.0)
    wide = torch.zeros(10, 43, dtype=BF16, device=DEVICE)
    wide[:, :40] = case.hidden_NH
    assert not fused_logprob.tma_fits(wide[:, :40])
    one = target_logps(wide[:1, :40], case.weight_VH, case.targets_N[:1], impl="fused")
    logps = target_logps(wide[:, :40], case.weight_VH, case.targets_N, impl="fused")
    assert torch.equal(logps, target_logps(case.hidden_NH, case.weight_VH, case.targets_N, impl="fused"))
    assert torch.equal(one, logps[:1])


@pytest.mark.parametrize(
    "capability, dtype, chosen",
    [((9, 0), BF16, "fused"), ((8, 0), BF16, "triton"), ((12, 0), BF16, "triton"), ((9, 0), F32, "triton")],
)
def test_auto_takes_it_on_hopper(monkeypatch, capability, dtype, chosen):
    """By a tensor that says it is on a GPU: the choice looks at nothing else."""

    class OnGpu:
        is_cuda, device, shape = True, torch.device("cuda"), (10, 40)
        element_size = torch.empty(1, dtype=dtype).element_size

    OnGpu.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    weight = torch.zeros(90, 40, dtype=dtype)
    assert logprob.choose_passes("auto", OnGpu(), weight).__name__ == f"megatron_bvpo.kernels.{chosen}_logprob"
    if capability[0] != 9:
        with pytest.raises(ValueError, match="a card is no Hopper"):
            logprob.choose_passes("fused", OnGpu(), weight)
