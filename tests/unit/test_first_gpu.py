"""launch/first_gpu.sh: the driver, the judgement and the table, with runs that are made up; no rank is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.first_gpu import plan
from benchmarks.first_gpu.judge import BFLOAT16, FLOAT32, ROUNDING, Disagreement, judge
from benchmarks.first_gpu.recorder import NAME, merged
from benchmarks.first_gpu.run import Run, last_wins
from benchmarks.first_gpu.table import table

ROOT = Path(__file__).resolve().parents[2]


def steps(count: int = 2, error: float = 0.0, **changes) -> list[dict]:
    """Steps with log-probs off by `error`, relative."""
    rows = {f"{row} {stream}": [-700.0 * (1 + error), -650.0, -700.0, -650.0] for row in (1, 2) for stream in "te"}
    return [
        {"step": i + 1, "grad_norm": 2.0, "loss": 0.69, "alpha": 0.3, "logps": rows, "starved_tokens": 0, **changes}
        for i in range(count)
    ]


# ---- judgement


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_bounds_are_a_few_roundings(dtype):
    u = ROUNDING[dtype]
    assert judge(steps(), steps(), dtype, "numbers").number == 0
    assert judge(steps(error=u / 4), steps(), dtype, "numbers").ok
    assert not judge(steps(error=10 * u), steps(), dtype, "numbers").ok
    assert not judge(steps(grad_norm=2.0 * (1 + 100 * u)), steps(), dtype, "numbers").ok
    assert not judge(steps(loss=0.69 + 700 * u), steps(), dtype, "numbers").ok


def test_what_is_no_number_never_passes():
    nan = float("nan")
    for bad in (steps(error=nan), steps(loss=nan), steps(grad_norm=nan)):
        found = judge(bad, steps(), BFLOAT16, "numbers")
        assert not found.ok and found.number != found.number


def test_runs_of_other_rows_or_steps_are_not_compared():
    other = steps()
    other[1]["logps"] = {"9 t": [-1.0] * 4}
    for found, wanted, kind in (
        (other, steps(), "numbers"),
        (steps(1), steps(2), "numbers"),
        ([], [], "numbers"),
        (steps(4), steps(4), "resume"),
        (steps(starved_tokens=3), steps(), "starved"),
    ):
        with pytest.raises(Disagreement):
            judge(found, wanted, BFLOAT16, kind)
    assert judge(steps(4)[2:], steps(4), BFLOAT16, "resume").ok
    assert judge(steps(), steps(), BFLOAT16, "starved").ok


def test_ranks_are_put_together(tmp_path):
    """Two data-parallel ranks of a last stage with their rows, and one of a first stage without any loss."""
    write(tmp_path, 0, [{"step": 1, "grad_norm": 2.0, "logps": {}, "starved_tokens": 0}])
    for rank in (1, 2):
        line = {"step": 1, "grad_norm": 2.0, "loss": 0.5, "logps": {f"{rank} t": [-1.0]}, "starved_tokens": 2}
        write(tmp_path, rank, [line])
    (step,) = merged(tmp_path, 3)
    assert step == {
        "step": 1, "grad_norm": 2.0, "loss": 0.5, "logps": {"1 t": [-1.0], "2 t": [-1.0]}, "starved_tokens": 4
    }  # fmt: skip


def write(folder: Path, rank: int, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME.format(rank=rank)).write_text(json.dumps(lines))


# ---- driver


class MadeUp(Run):
    """Writes what ranks would have left; cells in `broken` leave nothing, those in `plant` other numbers."""

    broken: tuple[str, ...] = ()

    def _process(self, group, cells):
        for cell in cells:
            self.started = [*getattr(self, "started", []), cell.name]
            if cell.name in self.broken:
                self.failed[cell.name] = "RuntimeError: it broke"
                return
            made = steps(4 if "--train_iters 4" in cell.flags else 2, error=self.plant.get(cell.name, 0.0))
            for rank in range(self.ranks_of(cell.side)):
                write(self.place(cell), rank, made[2:] if cell.goes_on_from else made)


def start(folder: Path, broken=(), plant=None, gpu=True, seconds=60.0) -> tuple[MadeUp, list]:
    run = MadeUp(folder, "2 × card", 2, gpu=gpu, seconds=seconds, patience=1.0, plant=plant or {})
    run.broken = broken
    return run, run(plan.groups(gpu), plan.comparisons(gpu))


def test_everything_is_compared_once_and_not_again(tmp_path):
    run, left = start(tmp_path)
    assert left == [] and len(run.found()) == len(plan.comparisons(True)) >= 15
    assert all(line["ok"] for line in run.found().values())
    assert len(run.started) == len(set(run.started)) == sum(len(g.cells) for g in plan.groups(True))
    again, left = start(tmp_path)
    assert left == [] and not hasattr(again, "started")


def test_a_fault_fails_its_lines_alone_and_is_tried_again(tmp_path):
    run, left = start(tmp_path, plant={"LoRA": 1e-2})
    bad = {key for key, line in run.found().items() if not line["ok"]}
    assert left == [] and bad == {"LoRA equals the stand-ins"}
    text = table(run.found(), [c.key for c in plan.comparisons(True)], "x")
    assert "| LoRA equals the stand-ins | **FAILED** | 1.0e-02 |" in text and "What to do: compare peft's" in text
    again, _ = start(tmp_path)
    assert again.started == ["LoRA"] and all(line["ok"] for line in again.found().values())


def test_a_broken_cell_costs_what_depends_on_it(tmp_path):
    run, left = start(tmp_path, broken=("bf16", "whole"))
    found = run.found()
    assert left == [] and "RuntimeError: it broke" in found["bf16 equals the stand-ins"]["failed"]
    assert "resumed" not in run.started and found["a resumed run goes on"]["failed"].endswith("it broke")
    assert found["LoRA equals the stand-ins"]["ok"] and found["float32 equals the stand-ins"]["ok"]
    assert not found["fusion masked softmax"]["ok"]
    again, _ = start(tmp_path)
    assert all(line["ok"] for line in again.found().values())


def test_when_time_is_up_the_rest_is_left_open(tmp_path):
    run, left = start(tmp_path, seconds=0.0)
    assert len(left) == len(plan.comparisons(True)) and run.found() == {}


def test_every_cell_has_a_use_and_every_comparison_its_cells():
    for gpu in (True, False):
        cells = {cell.name for group in plan.groups(gpu) for cell in group.cells}
        used = {name for c in plan.comparisons(gpu) for name in (c.cell, c.against)}
        assert cells == used
        for group in plan.groups(gpu):
            assert len({cell.side for cell in group.cells}) == 1
            # Megatron's choice of attention holds for the life of a process.
            flags = [last_wins(cell.flags.split()) for cell in group.cells]
            assert len({f[f.index("--attention_backend") + 1] for f in flags}) == 1


def test_a_later_flag_takes_the_place_of_an_earlier_one():
    assert last_wins("--a 1 --b x y --a 2".split()) == "--a 2 --b x y".split()


def test_flags_are_known_to_ms_swift():
    from megatron_bvpo.launching.flag_names import flag_names

    known = set(flag_names())
    for gpu in (True, False):
        for group in plan.groups(gpu):
            for cell in group.cells:
                flags = {t[2:] for t in f"{plan.RUN} {cell.flags} {plan.LAYOUTS[8]}".split() if t.startswith("--")}
                assert flags <= known, flags - known


def test_the_script_without_a_gpu_says_what_to_do(tmp_path):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "BVPO_PYTHON_BIN": sys.executable}
    done = subprocess.run([ROOT / "launch" / "first_gpu.sh"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--cpu rehearses without one" in done.stderr


def test_stand_ins_that_are_missing_are_told(tmp_path, monkeypatch):
    groups = [
        replace(g, cells=tuple(replace(c, stand_ins="nothing-there") if "fusion" in c.name else c for c in g.cells))
        for g in plan.groups(False)
    ]
    run = MadeUp(tmp_path, "cpu", 2, gpu=False, seconds=60.0, patience=1.0, plant={})
    assert run(groups, plan.comparisons(False)) == []
    line = run.found()["fusion masked softmax"]
    assert line["ok"] and "the stand-ins have no nothing-there" in line["skipped"]
    again = MadeUp(tmp_path, "cpu", 2, gpu=False, seconds=60.0, patience=1.0, plant={})
    monkeypatch.setattr("benchmarks.first_gpu.run.rehearsed", lambda cell: True)  # they have it by now
    assert again(groups, plan.comparisons(False)) == [] and "skipped" not in again.found()["fusion masked softmax"]
