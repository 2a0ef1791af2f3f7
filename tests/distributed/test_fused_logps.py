"""Runs with the fused log-prob product, by Triton's interpreter on a CPU: they agree with plain torch on one rank.

Two ranks share vocabulary and sequence; the second run reads its reference log-probs from the cache of the first.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.cells import Cell, run_cells
from tests.distributed.test_parity import TOLERANCE, argv, errors


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("fused")
    found = run_cells(1, [Cell("torch", argv(workshop, "one-rank", "lora", "free"))], folder)
    fused = argv(workshop, "tp2", "lora", "free", f"--bvpo_logp_impl fused --bvpo_ref_cache {folder / 'references'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Not forked: the kernels are the interpreter's from their definition on, or never.
        found |= run_cells(2, [Cell("fused", fused), Cell("cached", fused)], folder, forked=False)
    return found


@pytest.mark.parametrize("name", ["fused", "cached"])
def test_agrees_with_plain_torch_on_one_rank(runs, name):
    for key, error in errors(runs[name], runs["torch"]).items():
        assert error <= TOLERANCE, f"{key} differs by {error:.2e}"
    ours, base = runs[name].recorded["gradients"][0], runs["torch"].recorded["gradients"][0]
    scale = max(g.norm().item() for g in base.values())
    for key, gradient in base.items():
        assert (ours[key] - gradient).norm() <= TOLERANCE * max(gradient.norm().item(), 1e-2 * scale), key


def test_it_was_the_fused_product(runs):
    """Else all would hold as well."""
    assert json.loads((runs["fused"].folder / "args.json").read_text())["bvpo_logp_impl"] == "fused"
    assert list((runs["fused"].folder.parent / "references").rglob("*")), "nothing was cached"
