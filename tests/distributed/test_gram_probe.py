"""Probes of three streams: their Gram matrices in every layout, against one rank and whole gradients in float64.

As test_probe.py does it for two; rows lack streams unevenly. The float64 side shares no code with the shards, the
buffers and the reduction.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.cells import CellResult, run_by_ranks
from tests.distributed.full_gradients import shared_factor
from tests.distributed.oracle_runs import moe
from tests.distributed.stream_runs import cell, stream_rows, write
from tests.distributed.test_parity import LAYOUTS, TUNERS
from tests.distributed.test_probe import HOOK, wanted

NAMES = ("trace", "empty", "short")
PAIRS = list(itertools.combinations_with_replacement(NAMES, 2))
GRAMS = [f"gram/C_{j}_{k}" for j, k in PAIRS] + [f"gram/D_{j}_{k}" for j, k in PAIRS if j != NAMES[0]]
# fault: the layout, and more flags
FAULTS = {
    "replicas counted on every rank": ("tp2-ep2", ""),
    "experts forgotten": ("ep2", ""),
    "copies not divided": ("dp2", "--use_distributed_optimizer false"),
    "cross term dropped": ("one-rank", ""),
    "local gradients": ("dp2", "--use_distributed_optimizer false"),
    "one factor for all": ("one-rank", ""),
    "a stream turned around": ("one-rank", ""),
}


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole-matrix")
        cells = [f"{layout}-{tuner}" for layout in LAYOUTS for tuner in TUNERS if wanted(layout, tuner, whole)]
        metafunc.parametrize("name", cells)


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request) -> dict[str, CellResult]:
    folder = tmp_path_factory.mktemp("grams")
    data = write(workshop, "three", stream_rows(workshop))
    flags = f"{moe(workshop)} --dataset {data} --global_batch_size 8 --train_iters 1 --bvpo_weights auto"
    flags += f" --bvpo_streams {' '.join(NAMES)}"
    by_ranks: dict[int, list] = {1: [], 2: [], 4: []}
    for layout, tuner in itertools.product(LAYOUTS, TUNERS):
        if wanted(layout, tuner, request.config.getoption("--whole-matrix")):
            ranks, more = LAYOUTS[layout]
            by_ranks[ranks].append(cell(f"{layout}-{tuner}", f"{flags} {TUNERS[tuner]} {more}", hook=HOOK))
    for fault, (layout, more) in FAULTS.items():
        ranks, split = LAYOUTS[layout]
        broken = f"{flags} {TUNERS['lora']} {split} {more}"
        # With local gradients the replicas take steps of their own, and the canaries say so, too.
        apart = {"canaries": True} if fault == "local gradients" else {}
        by_ranks[ranks].append(cell(fault.replace(" ", "_"), broken, hook=HOOK, hook_args={"mutation": fault}, **apart))
    return run_by_ranks(folder, by_ranks)


def float64_grams(result: CellResult) -> dict[str, float]:
    """MATH.md §5 from whole gradients by name; nothing of the project's gradient code."""
    saved = torch.load(result.folder / "passes.pt", weights_only=False)
    passes = dict(zip(itertools.product(NAMES, "AB"), saved["passes"], strict=True))
    rows, shared = saved["counts"], saved["shared"]
    names = [name for name in passes["trace", "A"] if shared_factor(name) == name]

    def whole(gradients: dict) -> torch.Tensor:
        return torch.cat([gradients[name].double().flatten() for name in names])

    vectors = {key: whole(gradients) for key, gradients in passes.items()}
    found = {}
    gap = {s: sum(n / sum(rows[s]) * vectors[s, h] for h, n in zip("AB", rows[s], strict=True)) for s in NAMES}
    for j, k in PAIRS:
        both = rows[j] if j == k else shared[j, k]
        n, m = rows[j], rows[k]
        apart = sum(b / (x * y) for b, x, y in zip(both, n, m, strict=True))
        factor = sum(both) / (sum(n) * sum(m)) / apart
        one, other = (vectors[s, "A"] - vectors[s, "B"] for s in (j, k))
        found[f"gram/C_{j}_{k}"] = factor * (one @ other).item()
        if j != NAMES[0]:
            found[f"gram/D_{j}_{k}"] = ((gap[j] - gap[NAMES[0]]) @ (gap[k] - gap[NAMES[0]])).item()
    return found


def distance(result: CellResult, right: dict[str, float]) -> float:
    """The largest error of any entry, in units of the largest entry of its matrix, at the first step."""
    found = {key: result.steps(key)[0] for key in GRAMS}
    size = {kind: max(abs(right[key]) for key in GRAMS if key.startswith(kind)) for kind in ("gram/C", "gram/D")}
    return max(abs(found[key] - right[key]) / size[key[:6]] for key in GRAMS)


def test_the_rows_lack_streams_unevenly(runs):
    saved = torch.load(runs["one-rank-lora"].folder / "passes.pt", weights_only=False)
    members, shared = saved["counts"], saved["shared"]
    shares = {tuple(n / sum(members[s]) for n in members[s]) for s in NAMES}
    assert len(shares) > 1 and len({sum(n) for n in shared.values()}) > 1, (members, shared)
    assert all(sum(both) < max(sum(members[s]) for s in pair) for pair, both in shared.items())


def test_gram_matrices_agree_with_gathered_gradients_in_float64(runs, name):
    assert distance(runs[name], float64_grams(runs[name])) < 1e-4


def test_gram_matrices_agree_with_one_rank(runs, name):
    base = runs[f"one-rank-{name.rpartition('-')[2]}"]
    assert distance(runs[name], {key: base.steps(key)[0] for key in GRAMS}) < 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices(runs, fault):
    broken = runs[fault.replace(" ", "_")]
    assert distance(broken, float64_grams(broken)) > 1e-3
