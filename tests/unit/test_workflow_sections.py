"""Where the stages of a file run: flags of sbatch."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.workflow.sections import SectionReader


def place(text: str):
    """Of a file's section `train`."""
    Path("file.yaml").write_text(text)
    reader = SectionReader("file.yaml")
    reader.what = "sweep"
    return reader.place("train", reader.section("train"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_section_s_own_flags_come_over_those_of_all():
    found = place("slurm: {partition: gpu, time: 60}\ntrain: {slurm: {nodes: 4, time: 90, exclusive: true}}\n")
    assert found.words == ("--partition", "gpu", "--time", "90", "--nodes", "4", "--exclusive")
    assert place("slurm: {partition: gpu}\ntrain: {}\n").slurm is None


@pytest.mark.parametrize("flag", ["job_name", "job-name", "output", "outp", "array", "clusters", "export", "test_only"])
@pytest.mark.parametrize("common", [True, False])
def test_flags_by_which_the_chain_finds_its_job_are_refused(flag, common):
    """sbatch would take the last one given; it also takes a flag's beginning."""
    text = f"slurm:\n  {flag}: x\ntrain: {{slurm: {{nodes: 4}}}}\n" if common else f"train:\n  slurm:\n    {flag}: x\n"
    with pytest.raises(UserError) as error:
        place(text)
    told = f"{'' if common else 'train.'}slurm.{flag}: is given by the sweep; leave it out"
    assert str(error.value).startswith("file.yaml:") and told in str(error.value)
