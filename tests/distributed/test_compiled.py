"""What a GPU run hands to torch.compile, compiled here, too, with the same numbers.

Megatron compiles a few small functions (its `jit_fuser`). A rehearsal runs them as they are: code for a CPU says
nothing about a GPU's and takes minutes. What comes before the code is the same on both: graphs, guards, and sizes that
change from expert to expert. That runs here, on one rank; `--whole-matrix` makes the code, too.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.cells import SHIPPED_FLAGS, Cell, CellResult, run_cells
from tests.distributed.test_parity import TOLERANCE, argv, errors

HOOK = "tests.distributed.compile_recorder:record_compiled"
# Of a mixture of experts: what the experts compute, forward and backward; what is added to the residual stream, by the
# policy and, without dropout, by the reference.
COMPILED = {
    "weighted_swiglu",
    "weighted_swiglu_back",
    "bias_dropout_add_fused_train",
    "bias_dropout_add_fused_inference",
}


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory, request) -> dict[str, CellResult]:
    folder = tmp_path_factory.mktemp("compiled")
    plain = Cell("plain", argv(workshop, "one-rank", "lora", "free"))
    compiled = Cell("compiled", argv(workshop, "one-rank", "lora", "free", " ".join(SHIPPED_FLAGS)), HOOK)
    found = run_cells(1, [plain], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "0")
        makes_code = request.config.getoption("--whole-matrix")
        patch.setenv("BVPO_TEST_COMPILE", "inductor" if makes_code else "aot_eager")
        # Not forked: it is decided while Megatron is imported.
        return found | run_cells(1, [compiled], folder, forked=False)


def test_compiled_functions_give_the_same_run(runs):
    for key, error in errors(runs["compiled"], runs["plain"]).items():
        assert error <= TOLERANCE, f"{key} differs by {error:.2e}"
    ours, base = (runs[name].recorded["gradients"][0] for name in ("compiled", "plain"))
    scale = max(g.norm().item() for g in base.values())
    for name, gradient in base.items():
        assert (ours[name] - gradient).norm().item() <= TOLERANCE * max(gradient.norm().item(), 1e-2 * scale), name


def test_they_were_compiled_without_failure_and_not_ever_anew(runs):
    """Beyond torch's limit of guards a function runs uncompiled, which costs a GPU run time."""
    found = json.loads((runs["compiled"].folder / "compiled.json").read_text())
    assert COMPILED <= found["times"].keys(), found
    assert found["failed"] == []
    assert max(found["times"].values()) < found["limit"], found
