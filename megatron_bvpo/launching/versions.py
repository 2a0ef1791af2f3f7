"""The versions that work together, as one table, and an early and clear refusal of others.

Reads package metadata only; importing the packages would take many seconds. pyproject.toml repeats the
ranges as dependencies, and a test compares the two.
"""

import os
from dataclasses import dataclass
from importlib import metadata

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

import megatron_bvpo
from megatron_bvpo.errors import UserError

# Set to 1 to go on with versions outside the table, at one's own risk.
SKIP = "BVPO_SKIP_VERSION_CHECK"


@dataclass(frozen=True)
class Supported:
    """One row: a package, its range, the version that was tested, and the reason of the bounds."""

    package: str
    specifier: str
    tested: str
    why: str
    marker: str = ""

    def requirement(self) -> Requirement:
        return Requirement(f"{self.package}{self.specifier}" + (f"; {self.marker}" if self.marker else ""))

    def applies(self) -> bool:
        return not self.marker or Marker(self.marker).evaluate()


SUPPORTED = (
    Supported("ms-swift", ">=4.6,<4.7", "4.6.0", "the trainer and arguments that BVPO extends are those of 4.6"),
    Supported("mcore-bridge", ">=1.6.5,<1.7", "1.6.5", "the output layer hooks are those of 1.6.5"),
    Supported(
        "megatron-core",
        ">=0.16,<0.17",
        "0.16.1",
        "0.17 and later need Python 3.12",
        marker="python_version < '3.12'",
    ),
    Supported(
        "megatron-core",
        ">=0.16,<0.20",
        "0.19.2",
        "mcore-bridge 1.6 supports 0.16 to 0.19",
        marker="python_version >= '3.12'",
    ),
    Supported(
        "peft",
        ">=0.15,<0.21",
        "0.18.1",
        "as ms-swift 4.6",
    ),
    Supported("transformers", ">=4.51,<5.20", "5.19.0", "Qwen3-MoE came with 4.51; ms-swift 4.6 stops before 5.20"),
    Supported("trl", ">=0.15,<1.0", "0.29.1", "as ms-swift 4.6"),
    Supported("datasets", ">=4.0,<4.8.5", "4.8.4", "as ms-swift 4.6"),
    Supported(
        "torch",
        ">=2.6",
        "2.13.0",
        "as megatron-core; unbounded above, so that pip keeps the torch of an image",
    ),
    Supported(
        "triton",
        ">=3.0",
        "3.9.0",
        "mcore-bridge imports it at the top",
        marker="platform_system == 'Linux'",
    ),
)


@dataclass(frozen=True)
class Finding:
    """A row of the table with what is installed: `found` is None where the package is missing."""

    row: Supported
    found: str | None

    @property
    def ok(self) -> bool:
        if self.found is None:
            return False
        try:
            version = Version(self.found)
        except InvalidVersion:
            return False
        # Images carry builds such as 2.10.0a0+nv25.12: pre-releases count.
        return self.row.requirement().specifier.contains(version, prereleases=True)

    def __str__(self) -> str:
        wanted = f"{self.row.package}{self.row.specifier}"
        state = "is not installed" if self.found is None else f"{self.found} is installed"
        return f"{self.row.package} {state}, supported is {wanted} ({self.row.why})"


def installed(package: str) -> str | None:
    """The version of a package from its metadata, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def findings() -> list[Finding]:
    """Every row that applies to this Python, with the version found."""
    return [Finding(row, installed(row.package)) for row in SUPPORTED if row.applies()]


def require_supported() -> None:
    """Raise one UserError that names every package outside its range, and the command that mends it."""
    bad = [finding for finding in findings() if not finding.ok]
    if not bad or os.environ.get(SKIP) == "1":
        return
    wanted = " ".join(f"'{finding.row.package}{finding.row.specifier}'" for finding in bad)
    raise UserError(
        f"megatron-bvpo {megatron_bvpo.__version__}: " + "; ".join(str(finding) for finding in bad) + ".",
        remedy=f"Run: pip install {wanted}",
    )
