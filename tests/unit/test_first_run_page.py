"""The commands of docs/first-run.md: each is read by a shell, names what is there, and the short ones are run.

Steps 2, 5 and 6 run as they stand, with the shared disk in a folder of the test's. The others need a network, a cluster
or a GPU: of them the files, variables and flags are looked up.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.rehearsal.sample_data import make_sample_rows

ROOT = Path(__file__).resolve().parents[2]
MODEL = "Qwen3-235B-A22B-Thinking-2507"


def commands() -> list[str]:
    """One text a command, its continued lines joined."""
    page = (ROOT / "docs" / "first-run.md").read_text().replace("\\\n", " ")
    return [line.strip() for line in page.splitlines() if line.startswith("    ")]


def words(command: str) -> list[str]:
    return shlex.split(command)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of what step 6 copies from, with the model and the rows that steps 4 and 5 speak of."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    model = tmp_path / "shared" / "models" / MODEL
    model.mkdir(parents=True)
    shutil.copy(ROOT / "megatron_bvpo" / "planning" / "shapes" / f"{MODEL}.json", model / "config.json")
    rows = make_sample_rows(4, seed=1)
    (tmp_path / "shared" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(command: str, folder: Path) -> str:
    python = f"{sys.executable} -c 'import sys; from megatron_bvpo.cli import bvpo; sys.exit(bvpo())'"
    command = re.sub(r"^bvpo ", lambda _: f"{python} ", command.replace("/shared/", f"{folder}/shared/"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_commands_that_a_shell_can_read():
    assert len(commands()) >= 14
    for command in commands():
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


def test_what_they_name_is_there():
    known = (ROOT / "launch" / "slurm.sbatch").read_text() + (ROOT / "launch" / "train.sh").read_text()
    for command in commands():
        for word in words(command):
            variable = re.match(r"(BVPO_\w+)=", word)
            assert not variable or re.search(rf"^#   {variable[1]}\b|, {variable[1]}\b", known, re.M), word
            if re.match(r"(configs|launch|containers)/|\./", word):
                assert (ROOT / word).exists(), word
        trained = words(command)[words(command).index("launch/slurm.sbatch") + 2 :] if "slurm.sbatch" in command else []
        assert {word[2:] for word in trained if word.startswith("--")} <= set(flag_names())


def test_plan_rows_and_the_copy_of_the_config(checkout):
    """Steps 2, 5 and 6; the editor is a stream editor."""
    asked = [command for command in commands() if command.startswith(("bvpo plan", "bvpo rows", "cp "))]
    assert [words(command)[:2] for command in asked] == [
        ["bvpo", "plan"],
        ["bvpo", "rows"],
        ["cp", "configs/qwen3_235b_a22b_thinking_lora_4nodes.yaml"],
        ["bvpo", "plan"],
        ["bvpo", "rows"],
    ]
    first_plan, rows, copy, second_plan, own_rows = asked
    verdict = run(first_plan, checkout).splitlines()[-1]
    assert verdict.startswith("fits: ")
    assert "4 rows read, 4 kept." in run(rows, checkout)
    run(copy, checkout)
    config = checkout / "my-run.yaml"
    text = re.sub(r"^model: \S+", f"model: {checkout}/shared/models/{MODEL}", config.read_text(), flags=re.M)
    config.write_text(re.sub(r"^dataset: \S+", f"dataset: {checkout}/shared/pairs.jsonl", text, flags=re.M))
    planned = run(second_plan, checkout)
    assert planned.splitlines()[-1] == verdict and f"{checkout}/shared/models/{MODEL}: " in planned
    assert "4 rows read, 4 kept." in run(own_rows, checkout)


def test_a_wrong_path_in_the_copy_is_told(checkout):
    config = checkout / "my-run.yaml"
    text = (checkout / "configs" / "qwen3_235b_a22b_thinking_lora_4nodes.yaml").read_text()
    config.write_text(re.sub(r"^model: \S+", "model: /shared/modles/Qwen3", text, flags=re.M))
    for command, told in (("plan", "/shared/modles/Qwen3"), ("rows", "pairs.jsonl: no such file")):
        with pytest.raises(AssertionError, match=told):
            run(f"bvpo {command} my-run.yaml", checkout)
