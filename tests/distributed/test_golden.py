"""What two-stream runs log, number by number, against a file from before streams became a table.

`golden/two_streams.json` was written by the code of 2026-11-27, with a trainer of four mixins. The step by
composition and the table of streams gave the same numbers to the last bit on the CPU that wrote it. Another x86-64 CPU
sums in another order, and so do kernels that cut their tiles in another way: here the numbers are held to float32's
error. Write the file anew (`BVPO_WRITE_GOLDEN=1`) only for a change that is meant to change what is logged, and say so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.distributed.cells import CPU_FLAGS, Cell, run_by_ranks
from tests.distributed.oracle_runs import dense, moe, other_dense, packing_rows
from tests.distributed.test_parity import LAYOUTS

GOLDEN = Path(__file__).parent / "golden" / "two_streams.json"
HOOK = "tests.distributed.golden_recorder:record_logged"
# Differences of gradients that nearly cancel, and what is made of them.
MEASURED = ("moments/", "alpha", "mse/")
RELATIVE, MEASURED_RELATIVE, ABSOLUTE = 2e-6, 2e-4, 1e-6


def cells(workshop, folder: Path) -> dict[int, list[Cell]]:
    run = "--lr 1e-3 --adam_eps 1e-4 --micro_batch_size 1 --logging_steps 1 --max_length 512 --global_batch_size 4 "
    lora = "--tuner_type lora --lora_rank 4 --lora_dropout 0"
    rows, held_out = f"--dataset {packing_rows(workshop)}", f"--val_dataset {workshop.held_out} --eval_steps 2"
    train = f"--dataset {workshop.train}"
    full = f"{dense(workshop)} --tuner_type full --ref_model {other_dense(workshop)}"
    mixture = f"{moe(workshop)} {lora} --target_modules all-linear all-router"
    aux = "--moe_aux_loss_coeff 0.01"
    kept = {name: f"--bvpo_ref_cache {folder / 'caches' / name}" for name in ("one", "stages")}
    of_ranks = {
        1: {
            "fixed": f"{rows} {mixture} --bvpo_alpha 0.3 --train_iters 3 {held_out} --bvpo_eval_on_start true",
            "auto": f"{rows} {full} --bvpo_alpha auto --train_iters 4 --rpo_alpha 0.1 {held_out}",
            "auto-router": f"{train} {mixture} {aux} --bvpo_alpha auto --train_iters 3 --micro_batch_size 2",
            "packed": f"{rows} {full} --bvpo_alpha auto --loss_type hinge --packing true --packing_length 1200 "
            "--global_batch_size 2 --train_iters 3",
            "cached": f"{train} {mixture} {kept['one']} --loss_type ipo --bvpo_alpha 0.5 --global_batch_size 8 "
            "--train_iters 3",
            "alone": f"{train} {dense(workshop)} --tuner_type full --bvpo_alpha 1 --loss_type simpo --train_iters 2",
        },
        2: {
            "tp2": f"{rows} {mixture} {aux} --bvpo_alpha auto --train_iters 3 {LAYOUTS['tp2'][1]}",
            "stages": f"{train} {mixture} {kept['stages']} --bvpo_alpha auto --global_batch_size 8 --train_iters 3 "
            f"{LAYOUTS['pp2-vpp2'][1]}",
        },
    }
    return {
        ranks: [Cell(name, [*f"{run} {flags}".split(), *CPU_FLAGS], hook=HOOK) for name, flags in named.items()]
        for ranks, named in of_ranks.items()
    }


@pytest.fixture(scope="module")
def logged(workshop, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("golden")
    found = run_by_ranks(folder, cells(workshop, folder))
    lines = {name: result.recorded for name, result in found.items()}
    if exact := os.environ.get("BVPO_WRITE_GOLDEN"):
        (GOLDEN if exact == "1" else Path(exact)).write_text(json.dumps(lines, indent=1) + "\n")
    return lines


@pytest.fixture(scope="module")
def golden() -> dict[str, list[dict[str, float]]]:
    return json.loads(GOLDEN.read_text())


NAMES = ("fixed", "auto", "auto-router", "packed", "cached", "alone", "tp2", "stages")


@pytest.mark.parametrize("name", NAMES)
def test_logs_what_it_logged(logged, golden, name):
    ours, before = logged[name], golden[name]
    assert [list(line) for line in ours] == [list(line) for line in before]
    for number, (line, expected) in enumerate(zip(ours, before, strict=True)):
        for key, value in expected.items():
            relative = MEASURED_RELATIVE if key.startswith(MEASURED) else RELATIVE
            assert line[key] == pytest.approx(value, rel=relative, abs=ABSOLUTE), (number, key)


def test_the_golden_runs_train_and_measure(golden):
    """What is compared above is not what a run that does nothing would log, too."""
    assert golden.keys() == set(NAMES)
    for name in ("auto", "auto-router", "packed", "tp2", "stages"):
        assert sum("moments/D" in line for line in golden[name]) == 3 + (name == "auto")
    assert golden["fixed"][0]["eval_loss"] > golden["fixed"][-1]["eval_loss"]
    assert [line["ref_cache/hits"] for line in golden["cached"]] == [0, 0, 1]
