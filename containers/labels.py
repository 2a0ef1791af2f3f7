"""`python labels.py LOCK`: the image's labels, one `name value` a line, from what is installed.

Fails where an installed version is not the lock's: an image that says other than it holds must not be built.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PREFIX = "org.megatron-bvpo."
# What decides a run's numbers. A package that the lock does not have (the CPU profile has no Transformer Engine) gets
# no label; the list of all packages is in /opt/bvpo/packages.txt and in the bill of materials.
LABELLED = (
    "torch",
    "triton",
    "ms-swift",
    "mcore-bridge",
    "megatron-core",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "transformer-engine",
    "transformer-engine-cu13",
    "transformer-engine-torch",
    "flash-attn",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
)


def locked(lock: Path) -> dict[str, str]:
    """Package → version of a lock that containers/lock.sh wrote."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", lock.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def labels(lock: Path, installed=metadata.version) -> dict[str, str]:
    """Label → value.

    Raises:
        SystemExit: a package of the lock is missing or has another version.
    """
    pins = locked(lock)
    wrong = []
    for name, version in pins.items():
        try:
            found = installed(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            wrong.append(f"{name}: {lock.name} says {version}, installed is {found}")
    if wrong:
        raise SystemExit("labels.py: the installed packages are not the lock's.\n  " + "\n  ".join(wrong))
    result = {f"{PREFIX}{name}": pins[name] for name in LABELLED if name in pins}
    result[f"{PREFIX}python"] = platform.python_version()
    result["org.opencontainers.image.version"] = installed("megatron-bvpo")
    if "flash-attn" in pins:
        result[f"{PREFIX}apex"] = apex_commit()
    return result


def apex_commit() -> str:
    """The commit that apex was built from, which pip records (PEP 610)."""
    import json

    record = metadata.distribution("apex").read_text("direct_url.json")
    return json.loads(record)["vcs_info"]["commit_id"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for name, value in labels(Path(sys.argv[1])).items():
        print(name, value)
