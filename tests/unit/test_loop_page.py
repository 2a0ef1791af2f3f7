"""docs/loop.md: its hours are the plan's for configs/rounds_235b.yaml, and its calendar speaks of the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_bvpo.workflow.rounds_costs import evaluation_of_model, sampling_of_round, training_of_round
from megatron_bvpo.workflow.rounds_file import Rounds, read_rounds

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")


def rounds_on(nodes: int, folder: Path, quantization: str | None = None) -> Rounds:
    """The shipped file with all of its stages on so many nodes."""
    values = yaml.safe_load((ROOT / "configs" / "rounds_235b.yaml").read_text())
    for section in ("sample", "train", "evaluate"):
        values[section]["slurm"]["nodes"] = nodes
    values["sample"]["job"] = str(ROOT / values["sample"]["job"])
    values["sample"]["engine"] = {"quantization": quantization}
    values["train"]["run"] = str(ROOT / "configs" / f"qwen3_235b_a22b_thinking_lora_{nodes}nodes.yaml")
    (folder / "rounds.yaml").write_text(yaml.safe_dump(values))
    return read_rounds(str(folder / "rounds.yaml"))


def span(numbers: tuple[float, float], digits: int) -> str:
    return " to ".join(f"{number:,.{digits}f}" for number in numbers)


def row(beginning: str) -> str:
    (found,) = (line for line in PAGE.splitlines() if line.startswith(f"| {beginning}"))
    return found


@pytest.mark.parametrize("nodes", [4, 8])
def test_the_hours_are_the_plan_s(nodes, tmp_path):
    rounds = rounds_on(nodes, tmp_path)
    for beginning, estimate in (
        ("sampling, 2,500 prompts", sampling_of_round(rounds)),
        ("the same with weights in fp8", sampling_of_round(rounds_on(nodes, tmp_path, "fp8"))),
        ("training on at most one pair a prompt", training_of_round(rounds)),
        ("evaluation, each 1,000", evaluation_of_model(rounds)),
    ):
        cells = row(beginning).split("|")
        assert f"{span(estimate.hours, 1)} h" in cells[3 if nodes == 4 else 4], (estimate, cells)
        assert span(estimate.gpu_hours, 0) in cells[5], (estimate, cells)


def test_the_calendar_has_the_table_s_hours(tmp_path):
    calendar = PAGE.split("## Three weeks")[1]
    four, eight = rounds_on(4, tmp_path), rounds_on(8, tmp_path)
    assert f"{span(sampling_of_round(four).hours, 1)} h" in calendar
    assert f"({span(sampling_of_round(eight).hours, 1)} h)" in calendar
    one = training_of_round(four).hours
    assert f"({span(one, 1)} h)" in calendar and f"({span(tuple(8 * hours for hours in one), 0)} h)" in calendar


def test_what_was_not_measured_says_so(tmp_path, capsys):
    from megatron_bvpo.cli import bvpo

    assert bvpo(["rounds", str(ROOT / "configs" / "rounds_235b.yaml"), "--dry-run", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "nobody has measured it" in told and "GPU hours" in told and "launch/sample.sbatch" in told
    assert "Estimates.** Nobody has measured them" in PAGE
