"""The machine, its versions and the code: what every line's `run` refers to. Loads no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch triton transformers peft ms-swift mcore-bridge megatron-core transformer-engine liger-kernel "
    "cut-cross-entropy quack-kernels verl"
).split()


def smi(query: str) -> list[str] | None:
    """One card's answers, None where there is no card. Reads only: the card's settings are never touched."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [part.strip() for part in done.stdout.strip().split(",")] if done.returncode == 0 else None


def card_state() -> dict:
    """Clocks in MHz, temperature, power and why the card holds back, read through NVML: nvidia-smi can take a second.

    Empty where there is no card, or no nvidia-ml-py.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
            "watts": nvml.nvmlDeviceGetPowerUsage(card) // 1000,
            "throttled": hex(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)),
        }
    except Exception as error:  # what a card does not tell is no reason to lose its figure
        return {"unknown": type(error).__name__}


def name(tiny: bool) -> str:
    """What a figure was measured on: a second start skips only figures of the same card."""
    card = smi("name")
    where = card[0] if card else f"CPU {platform.machine()}"
    return f"{where}, tiny" if tiny else where


def about() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    card = smi("name,driver_version,memory.total") or ["no card", "", ""]
    return {
        "card": dict(zip(("name", "driver", "memory_mib"), card, strict=True)),
        "versions": versions,
        "commit": commit(),
        "kernels": digest(ROOT / "megatron_bvpo" / "kernels"),
    }


def commit() -> str:
    """The commit, and whether the tree differs from it; BVPO_COMMIT where the tree travels without its history."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BVPO_COMMIT", "unknown")


def digest(folder: Path) -> str:
    """Of the sources that the figures depend on most."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()[:12]
