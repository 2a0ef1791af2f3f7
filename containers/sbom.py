"""`python sbom.py PYTHON.json OUT.json`: adds the image's Debian packages to the bill of its Python packages.

cyclonedx-py lists Python packages only; the Debian ones come from dpkg. Both are CycloneDX 1.6 in JSON, written by
cyclonedx-python-lib.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL


def distribution() -> dict[str, str]:
    """/etc/os-release as a mapping."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines) if key}


def debian_packages() -> list[tuple[str, str, str]]:
    """(name, version, architecture) of every installed Debian package."""
    form = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"
    listing = subprocess.run(["dpkg-query", "-W", "-f", form], check=True, capture_output=True, text=True).stdout
    rows = [line.split("\t") for line in listing.splitlines()]
    return [(name, version, arch) for status, name, version, arch in rows if status.startswith("ii")]


def main(python_bom: Path, out: Path) -> None:
    bom = Bom.from_json(json.loads(python_bom.read_text()))
    system = distribution()
    for name, version, arch in debian_packages():
        qualifiers = {"arch": arch, "distro": f"{system['ID']}-{system['VERSION_ID']}"}
        url = PackageURL("deb", system["ID"], name, version, qualifiers)
        component = Component(type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=url.to_string())
        bom.components.add(component)
    make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_to_file(str(out), True, indent=2)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
