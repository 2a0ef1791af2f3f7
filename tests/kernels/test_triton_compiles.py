"""The Triton kernels compile for Hopper, without a GPU: what the interpreter cannot say.

Loads and stores of whole blocks must be 16 bytes wide and nothing may spill: both decide the speed of a pass
that is bound by memory. With the installed Triton, and with the one of the training image (torch 2.11): a download of
190 MB the first time, unless BVPO_TRITON_FOLDER names a folder of its unpacked wheel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hopper_compile.py"
IMAGES_TRITON = "3.6.0"
KEPT = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megatron-bvpo"
MOST_REGISTERS = 40  # 6 programs of 8 warps share a multiprocessor's 65,536


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", IMAGES_TRITON])
def test_kernels_compile_for_hopper(version):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--json"]
    if version != "installed":
        command += ["--triton", str(another_triton(version))]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    found = [json.loads(line) for line in out.stdout.splitlines()]
    assert version in ("installed", *{row["triton"] for row in found})
    passes = [row for row in found if row["kernel"] in ("_exp_pass", "_grad_pass")]
    products = [row for row in found if row["kernel"] == "_exp_product"]
    rows_of_h = [row for row in found if row["kernel"] in ("_target_logit", "_finish_gradient")]
    assert len(found) == 15 and len(passes) == 6 and len(rows_of_h) == 4
    assert all(row["wide_loads"] for row in passes + rows_of_h), f"narrow loads: {found}"
    writers = [row for row in passes + rows_of_h if row["kernel"] != "_target_logit"]
    assert all(row["wide_stores"] == row["form"].endswith("writes") for row in writers), f"narrow stores: {found}"
    # With entropies and with products: half the registers of one warp's row of e, which Triton 3.9 parks for a moment.
    assert all(row["stack_bytes"] <= (64 if "writes, entropy" in row["form"] else 0) for row in found), (
        f"spills: {found}"
    )
    assert not any(row["local_bytes"] for row in found), f"spills: {found}"
    assert all(row["registers"] <= MOST_REGISTERS for row in passes), f"registers: {found}"
    # One program of 8 warps on a multiprocessor: 256 registers a thread, 227 KiB of shared memory.
    assert [row["form"] for row in products if "entropy" not in row["form"]] == ["bf16, writes", "bf16, reads only"]
    assert all(row["matrix_instructions"] == ["m64n256k16.f32.bf16.bf16"] for row in products), products
    assert all(
        row["tma_loads"] and row["registers"] <= (255 if "entropy" in row["form"] else 240) for row in products
    ), products
    assert all(row["shared_bytes"] <= 227 * 1024 for row in products), products
    assert [row["tma_stores"] for row in products] == [True, False] * 2, products


def another_triton(version: str) -> Path:
    """The folder of an unpacked wheel; skips with the reason where there is none and none may or can be fetched."""
    if given := os.environ.get("BVPO_TRITON_FOLDER"):
        return Path(given)
    folder = KEPT / f"triton-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if (folder / "triton").is_dir():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(partial), f"triton=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {version} cannot be had: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    wheel = next(partial.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    for tool in (partial / "triton" / "backends" / "nvidia" / "bin").iterdir():
        tool.chmod(0o755)  # zipfile keeps no modes
    wheel.unlink()
    partial.replace(folder)
    return folder
