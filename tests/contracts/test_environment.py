"""The environment is read when it is needed: `datasets` puts another object in `os.environ`'s place.

`Dataset.map` with several processes sets `os.environ = prev_env`, a copy (datasets 4.8, arrow_dataset.py). What was
bound before, as a default argument or a module's constant, then shows an environment that nobody changes any more.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_bvpo"


def bound_early(source: str) -> list[int]:
    """Lines where `os.environ` itself becomes a default argument or a constant of a module or class."""
    tree = ast.parse(source)
    values = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            values += [*node.args.defaults, *node.args.kw_defaults]
        elif isinstance(node, ast.Module | ast.ClassDef):
            values += [part.value for part in node.body if isinstance(part, ast.Assign | ast.AnnAssign)]
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            values += [node for name in node.names if name.name == "environ"]
    return sorted(v.lineno for v in values if isinstance(v, ast.ImportFrom) or (v and ast.unparse(v) == "os.environ"))


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import os\ndef f(env=os.environ): ...", [2]),
        ("import os\ndef f(*, env=os.environ): ...", [2]),
        ("import os\nENV = os.environ", [2]),
        ("from os import environ", [1]),
        ("import os\ndef f():\n    env = os.environ\nX = os.environ.get('X')", []),
    ],
)
def test_the_check_sees_what_is_bound_early(source, lines):
    assert bound_early(source) == lines


def test_nothing_keeps_an_environment_from_before():
    found = {str(f.relative_to(PACKAGE)): bound_early(f.read_text("utf-8")) for f in PACKAGE.rglob("*.py")}
    assert len(found) > 100 and not {f: lines for f, lines in found.items() if lines}
