"""Transformer Engine's own Python sources, read and never run: which names there are, and what they take.

The wheel of the pinned version holds them all (1.2 MB; the compiled parts are in other packages). It is downloaded
once into a cache folder; BVPO_TE_WHEEL names one that is there already.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "transformer_engine"


def pinned_version() -> str:
    lock = (ROOT / "containers" / "lock-gpu.txt").read_text()
    return re.search(r"^transformer-engine==(\S+)", lock, re.MULTILINE)[1]


def wheel() -> Path | None:
    """The wheel of the pinned version, or None where it is neither here nor to be had."""
    if os.environ.get("BVPO_TE_WHEEL"):
        return Path(os.environ["BVPO_TE_WHEEL"])
    version = pinned_version()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-bvpo" / "wheels"
    name = f"{PACKAGE}-{version}-*.whl"
    if not list(cache.glob(name)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, f"{PACKAGE}=={version}"]
        subprocess.run(command, capture_output=True, timeout=120)
    return next(cache.glob(name), None)


@dataclass(frozen=True)
class Definition:
    """Where a name is defined: the module, and the node of its class, function or assignment."""

    module: str
    node: ast.stmt


class Sources:
    """A package's modules as syntax trees."""

    def __init__(self, texts: dict[str, str]):
        """`texts`: file name from the package's parent folder on → its text."""
        self.trees: dict[str, ast.Module] = {}
        self.packages: set[str] = set()
        for file, text in texts.items():
            module = file.removesuffix(".py").replace("/", ".")
            if module.endswith(".__init__"):
                module = module.removesuffix(".__init__")
                self.packages.add(module)
            self.trees[module] = ast.parse(text)

    @classmethod
    def of_wheel(cls, file: Path) -> Sources:
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if n.startswith(f"{PACKAGE}/") and n.endswith(".py")]
            return cls({name: archive.read(name).decode() for name in names})

    @classmethod
    def of_folder(cls, folder: Path) -> Sources:
        return cls({str(p.relative_to(folder.parent)): p.read_text() for p in folder.rglob("*.py")})

    def find(self, module: str, name: str) -> Definition | None:
        """The definition behind `module.name`, through all re-exports; None where there is none.

        A submodule counts as defined by its own tree, a name of the compiled part by its import.
        """
        if f"{module}.{name}" in self.trees:
            return Definition(f"{module}.{name}", self.trees[f"{module}.{name}"])
        found = None
        for node in _statements(self.trees.get(module)):
            match node:
                case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                    found = Definition(module, node)
                case ast.Assign() if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                    other = node.value.id if isinstance(node.value, ast.Name) else None
                    found = (self.find(module, other) if other else None) or Definition(module, node)
                case ast.ImportFrom():
                    for alias in node.names:
                        if name == (alias.asname or alias.name) or alias.name == "*":
                            source = self._absolute(module, node)
                            wanted = name if alias.name == "*" else alias.name
                            if source not in self.trees and alias.name != "*":
                                found = Definition(source, node)  # the compiled part's
                            elif source != module:
                                found = self.find(source, wanted) or found
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module
        parts = module.split(".")
        base = parts[: len(parts) - node.level + (module in self.packages)]
        return ".".join([*base, node.module] if node.module else base)

    def signature(self, found: Definition, method: str | None = None) -> inspect.Signature | None:
        """The parameters of a function, or of a class's method (inherited ones too), without `self`."""
        node = found.node
        if method is None:
            return _signature(node) if isinstance(node, ast.FunctionDef) else None
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == method:
                signature = _signature(item)
                return signature.replace(parameters=list(signature.parameters.values())[1:])
        for base in node.bases:
            above = self.find(found.module, base.id) if isinstance(base, ast.Name) else None
            if above is not None and isinstance(above.node, ast.ClassDef):
                inherited = self.signature(above, method)
                if inherited is not None:
                    return inherited
        return None


def _statements(node: ast.AST | None) -> Iterator[ast.stmt]:
    """Statements at the top of a module, those under `if`, `try` and `with` too."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, []):
            yield child
            if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                yield from _statements(child)


def _signature(node: ast.FunctionDef) -> inspect.Signature:
    """Defaults are kept as their source text, so that nothing has to be imported."""
    given, kinds = node.args, inspect.Parameter
    none = kinds.empty
    positional = [*given.posonlyargs, *given.args]
    defaults = [none] * (len(positional) - len(given.defaults)) + [ast.unparse(d) for d in given.defaults]
    out = [kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=d) for a, d in zip(positional, defaults, strict=True)]
    if given.vararg:
        out.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        out.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=none if d is None else ast.unparse(d)))
    if given.kwarg:
        out.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(out)


def names_that_hosts_use(folders: list[Path]) -> dict[tuple[str, str], list[str]]:
    """(module, name) of Transformer Engine → the hosts' files that import it or reach it as an attribute."""
    used = defaultdict(list)
    for file in sorted(path for folder in folders for path in folder.rglob("*.py")):
        tree = ast.parse(file.read_text())
        modules = {}  # what a name at hand stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == PACKAGE:
                        modules[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == PACKAGE:
                for alias in node.names:
                    used[node.module, alias.name].append(file.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                first, *rest = ast.unparse(node).split(".")
                if first in modules and all(part.isidentifier() for part in rest):
                    *module, name = [*modules[first].split("."), *rest]
                    used[".".join(module), name].append(file.name)
    return used
