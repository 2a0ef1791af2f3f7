"""Which versions a run was made with: `versions.json` in its folder, written when it starts."""

from __future__ import annotations

import json
import platform
from pathlib import Path

FILE = "versions.json"
# Beside the table of supported ones: what else decides numbers and speed on a GPU.
_MORE = ("transformer-engine", "flash-attn", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "numpy")


def installed_versions() -> dict[str, str]:
    """Package → version, of this environment. Reads metadata only."""
    import megatron_bvpo
    from megatron_bvpo.launching.versions import SUPPORTED, installed

    packages = dict.fromkeys([*(row.package for row in SUPPORTED), *_MORE])
    found = {"megatron-bvpo": megatron_bvpo.__version__, "Python": platform.python_version()}
    return found | {package: version for package in packages if (version := installed(package))}


def write_versions(folder: Path) -> None:
    """Raises OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(installed_versions(), indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
