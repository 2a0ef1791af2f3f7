"""Every call of a rehearsal to a stand-in is one that Transformer Engine's own signature takes."""

from __future__ import annotations

import json

import pytest

from tests.contracts import engine_sources
from tests.distributed.cells import CPU_FLAGS, SHIPPED_FLAGS, Cell, run_cells
from tests.distributed.engine_call_recorder import FUNCTIONS, METHODS

WHEEL = engine_sources.wheel()
pytestmark = pytest.mark.skipif(WHEEL is None, reason="Transformer Engine's wheel is not to be had (no index?)")


@pytest.fixture(scope="module")
def calls(workshop, tmp_path_factory) -> set[tuple]:
    flags = (
        f"--model {workshop.moe} --model_type qwen3_moe --template qwen3_thinking --dataset {workshop.train} "
        "--tensor_model_parallel_size 2 --sequence_parallel true --pipeline_model_parallel_size 2 "
        "--expert_model_parallel_size 2 --tuner_type lora --lora_rank 4 --micro_batch_size 2 --global_batch_size 4 "
        "--train_iters 1 --logging_steps 1 --max_length 512"
    )
    hook = "tests.distributed.engine_call_recorder:record_calls"
    folder = tmp_path_factory.mktemp("engine")
    run = run_cells(4, [Cell("calls", [*flags.split(), *CPU_FLAGS, *SHIPPED_FLAGS], hook=hook)], folder)["calls"]
    files = [json.loads((run.folder / f"calls_{rank}.json").read_text()) for rank in range(4)]
    return {(what, method, count, tuple(names)) for found in files for what, method, count, names in found}


def test_each_layer_of_the_model_was_seen(calls):
    assert {what for what, *_ in calls} == METHODS.keys() | FUNCTIONS.keys()


def test_the_real_signatures_take_every_call(calls):
    real = engine_sources.Sources.of_wheel(WHEEL)
    for cls, method, count, names in sorted(calls):
        module = "transformer_engine.pytorch" + ("" if method else ".permutation")
        signature = real.signature(real.find(module, cls), method or None)
        try:
            signature.bind(*[None] * count, **dict.fromkeys(names))
        except TypeError as error:
            pytest.fail(f"{cls}.{method} with {count} positional arguments and {names}: {error}; it takes {signature}")
