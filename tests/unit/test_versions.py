"""The table of supported versions: it agrees with pyproject.toml, and refuses in one clear message."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_bvpo.errors import UserError
from megatron_bvpo.launching import versions

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def declared() -> list[Requirement]:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def test_table_and_dependencies_agree():
    packages = {row.package for row in versions.SUPPORTED}
    from_pyproject = {str(requirement) for requirement in declared() if requirement.name in packages}
    assert from_pyproject == {str(row.requirement()) for row in versions.SUPPORTED}


def test_tested_versions_are_supported():
    for row in versions.SUPPORTED:
        assert versions.Finding(row, row.tested).ok, row


@pytest.mark.parametrize("package", ["ms-swift", "mcore-bridge", "megatron-core", "peft", "transformers"])
def test_each_row_lies_within_what_the_hosts_ask_for(package):
    """Else pip could not resolve: our lower bound must satisfy what ms-swift and mcore-bridge declare."""
    asked = [
        requirement
        for host in ("ms-swift", "mcore-bridge")
        for requirement in map(Requirement, metadata.requires(host))
        if requirement.name == package and (requirement.marker is None or requirement.marker.evaluate())
    ]
    rows = [row for row in versions.SUPPORTED if row.package == package and row.applies()]
    assert len(rows) == 1
    for requirement in asked:
        assert requirement.specifier.contains(rows[0].tested), (requirement, rows[0])


def test_an_image_keeps_its_own_torch():
    """Images carry builds such as these; pip must find nothing to replace."""
    torch = next(requirement for requirement in declared() if requirement.name == "torch")
    for version in ("2.13.0+cpu", "2.11.0+cu130", "2.10.0a0+b4e4ee81d3.nv25.12", "2.14.0.dev20261101"):
        assert torch.specifier.contains(version, prereleases=True), version
        assert versions.Finding(next(r for r in versions.SUPPORTED if r.package == "torch"), version).ok


def test_this_environment_is_supported():
    versions.require_supported()


def test_one_message_names_package_found_range_and_remedy(monkeypatch):
    found = {"peft": "0.21.0", "mcore-bridge": None}
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: found[name] if name in found else real(name))
    with pytest.raises(UserError) as caught:
        versions.require_supported()
    message = str(caught.value)
    assert "peft 0.21.0 is installed, supported is peft>=0.15,<0.21 (as ms-swift" in message
    assert "mcore-bridge is not installed, supported is mcore-bridge>=1.6.5,<1.7" in message
    assert message.endswith("Run: pip install 'mcore-bridge>=1.6.5,<1.7' 'peft>=0.15,<0.21'")
    assert "\n" not in message

    monkeypatch.setenv(versions.SKIP, "1")
    versions.require_supported()


@pytest.mark.parametrize("found", [None, "0.21.0", "0.21.0.dev0", "0.14.9", "unknown"])
def test_versions_outside_the_range_are_not_ok(found):
    peft = next(row for row in versions.SUPPORTED if row.package == "peft")
    assert not versions.Finding(peft, found).ok
