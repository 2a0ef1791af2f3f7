"""Which room may use which, that no imports run in a circle, what importing a room loads, and how long files are.

The sources are read as syntax trees: an import inside a function counts like one at the top, since it is needed all
the same. Imports for type checkers only do not count.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_bvpo"
STAND_INS = PACKAGE / "rehearsal" / "stand_ins"

# Room → rooms it may import. `errors`, `streams` and the package itself are everybody's; the command line may use all.
MAY_USE = {
    "launching": {"data"},
    "planning": {"data", "launching", "sampling"},
    "cluster": {"data", "launching", "planning"},
    "data": set(),
    "kernels": set(),
    "objective": set(),
    "gradients": {"data"},
    "host": {"data", "gradients", "kernels", "launching"},
    "training": {"data", "gradients", "host", "launching", "objective", "reporting"},
    "reporting": {"data", "evaluation", "launching"},
    "sampling": {"data", "launching"},
    "evaluation": {"data", "launching", "sampling"},
    # Reads and writes weights, so torch; on a login node, so no host.
    "export": {"data", "launching"},
    "growth": {"export"},
    "rehearsal": set(),
    "workflow": {"cluster", "data", "evaluation", "launching", "planning", "reporting", "sampling"},
}
HOSTS = {"megatron", "swift", "mcore_bridge", "transformer_engine", "transformer_engine_torch"}
# Where our files are, and the endings of those that people write.
WRITTEN = ("megatron_bvpo", "tests", "benchmarks", "configs", "containers", "launch", "plugins")
WRITTEN_BY_HAND = {".py", ".sh", ".sbatch", ".yaml", ".yml", ".def", ".js", ".css", ".j2", ".html"}
# Rooms of pure mathematics and of login nodes: no host framework, wherever in a file it is imported.
WITHOUT_HOSTS = {
    "kernels", "objective", "planning", "cluster", "reporting", "sampling", "evaluation", "export", "growth",
    "workflow",
}  # fmt: skip


def imports(source: str) -> set[str]:
    """Full names of what a file imports; `from a import b` counts as a and as a.b."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules(root: Path, package: str) -> dict[str, str]:
    """Module name → source of every file below `root`, the stand-ins (another package's names) left out."""
    out = {}
    for path in sorted(root.rglob("*.py")):
        if STAND_INS not in path.parents:
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return out


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module → modules of the same tree that it imports."""
    edges = {}
    for name, source in sources.items():
        # `from room import file` needs the file; the room's own __init__ comes with it and is no edge of its own.
        found = {m for m in imports(source) & sources.keys() if m != name}
        edges[name] = {m for m in found if not any(other.startswith(m + ".") for other in found)}
    return edges


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def trespasses(sources: dict[str, str]) -> list[str]:
    """Every import that MAY_USE and WITHOUT_HOSTS do not allow, as `module imports module`."""
    bad = []
    for name, found in graph(sources).items():
        mine = room(name)
        if mine in MAY_USE:
            free = {mine, "", "errors", "streams", *MAY_USE[mine]}
            bad += [f"{name} imports {other}" for other in sorted(found) if room(other) not in free]
        if mine in WITHOUT_HOSTS:
            hosts = {other.split(".")[0] for other in imports(sources[name])} & HOSTS
            bad += [f"{name} imports {host}" for host in sorted(hosts)]
    return bad


def circle(sources: dict[str, str]) -> list[str] | None:
    try:
        TopologicalSorter(graph(sources)).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def too_long(folder: Path) -> dict[str, int]:
    """Files below `folder` of more than 400 lines, without what machines wrote (locked packages, results)."""
    counts = {
        str(path.relative_to(folder)): path.read_bytes().count(b"\n")
        for path in folder.rglob("*")
        if path.suffix in WRITTEN_BY_HAND and path.is_file()
    }
    return {name: lines for name, lines in counts.items() if lines > 400}


OURS = modules(PACKAGE, "megatron_bvpo")


@pytest.mark.parametrize("folder", WRITTEN)
def test_no_file_is_longer_than_a_person_reads(folder):
    assert too_long(ROOT / folder) == {}


def test_a_planted_long_file_is_noticed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.sh").write_text("\n" * 401)
    (tmp_path / "enough.py").write_text("\n" * 400)
    assert too_long(tmp_path) == {"a/long.sh": 401}


def test_every_room_is_known():
    assert {room(name) for name in OURS if name.count(".") > 1} == MAY_USE.keys()


def test_rooms_use_only_what_they_may():
    assert trespasses(OURS) == []


def test_the_rules_themselves_have_no_circle():
    TopologicalSorter(MAY_USE).prepare()


@pytest.mark.parametrize("root", ["megatron_bvpo", "benchmarks/truth_bench"])
def test_no_circle_of_imports(root):
    assert circle(modules(ROOT / root, Path(root).name)) is None


@pytest.mark.parametrize(
    "module, line, complaint",
    [
        ("kernels.autograd", "from megatron.core import parallel_state", "imports megatron"),
        ("kernels.autograd", "def f():\n    import transformer_engine.pytorch", "imports transformer_engine"),
        ("kernels.autograd", "from megatron_bvpo.host import fused_head", "imports megatron_bvpo.host.fused_head"),
        ("data.rows", "import megatron_bvpo.training.trainer", "imports megatron_bvpo.training.trainer"),
        ("training.trainer", "from megatron_bvpo.rehearsal import install", "imports megatron_bvpo.rehearsal"),
    ],
)
def test_a_planted_import_is_noticed(module, line, complaint):
    name = f"megatron_bvpo.{module}"
    assert trespasses({**OURS, name: f"{OURS[name]}\n{line}\n"}) == [f"{name} {complaint}"]


def test_a_planted_circle_is_noticed():
    name = "megatron_bvpo.data.verdicts"
    found = circle({**OURS, name: OURS[name] + "\ndef f():\n    from megatron_bvpo.data import scan\n"})
    assert found and {name, "megatron_bvpo.data.scan"} <= set(found)


# Measured, since a library that we import may bring a host along.
@pytest.mark.parametrize(
    "module, unwanted",
    [
        ("kernels", HOSTS),
        ("objective.preference", HOSTS),
        ("objective.streams", HOSTS),
        ("gradients.alpha", HOSTS | {"torch"}),
        ("planning.command", HOSTS | {"torch", "transformers"}),
        ("launching.route", HOSTS | {"torch", "transformers", "packaging"}),
        ("launching.refusals", HOSTS | {"torch"}),
        ("data.scan", HOSTS | {"torch", "transformers", "datasets", "pyarrow"}),
        ("sampling.asking.sample_command", HOSTS | {"torch", "transformers", "aiohttp", "pyarrow", "asyncio"}),
        ("sampling.asking.sampling_run", HOSTS | {"torch", "transformers"}),
        ("evaluation.comparison", HOSTS | {"torch", "transformers"}),
        ("export.export_command", HOSTS | {"torch", "transformers"}),
        ("export.merging", HOSTS | {"transformers", "peft"}),
        ("growth.expand_command", HOSTS | {"torch", "transformers", "ot"}),
        ("growth.expansion", HOSTS | {"transformers", "peft"}),
        ("evaluation.evalscope_questions", HOSTS | {"torch", "transformers", "evalscope", "scipy"}),
        ("cluster.node_preflight", HOSTS | {"torch", "transformers"}),
        ("workflow.chain", HOSTS | {"torch", "transformers", "snakemake"}),
    ],
)
def test_importing_loads_no_host(module, unwanted):
    code = f"import sys, megatron_bvpo.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not unwanted & set(loaded.split())
