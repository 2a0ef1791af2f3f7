"""docs/upstream.md: its diffs apply to what is installed, and it has no figure of its own."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.version import Version

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "upstream.md").read_text("utf-8")
FAULTS = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.split(".")[0] for fault in FAULTS])
def test_the_diff_applies(fault, tmp_path):
    (name, version, diff), *more = re.findall(r"^Patch, against (\S+) (\S+):\n\n```diff\n(.*?)```", fault, re.M | re.S)
    installed = distribution(name)
    mended = re.search(rf"mended since {name} (\d+(?:\.\d+)*)", fault)
    if mended and Version(installed.version) >= Version(mended[1]):
        pytest.skip(f"{name} {installed.version} has it")
    assert (installed.version, more) == (version, []), "look at the fault again, and write its diff anew"
    files = re.findall(r"^\+\+\+ b/(\S+)$", diff, re.MULTILINE)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed.locate_file(file), tmp_path / file)
    patched = subprocess.run(["git", "apply", "-p1", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
    assert patched.returncode == 0, patched.stderr
    for file in files:
        text = (tmp_path / file).read_text("utf-8")
        assert text != Path(installed.locate_file(file)).read_text("utf-8")
        ast.parse(text)


def test_the_scripts_parse_and_name_their_start():
    scripts = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(scripts) >= 4 and all(script.startswith("# torchrun ") and ast.parse(script) for script in scripts)


def test_figures_are_those_of_the_table():
    operator = PAGE.split("\n## Host faults")[0]
    figures = re.findall(r"\d+\.\d+(?:×| ms)", operator)
    table = (DOCS / "logprob.md").read_text("utf-8")
    assert len(figures) >= 10 and [figure for figure in figures if figure not in table] == []
