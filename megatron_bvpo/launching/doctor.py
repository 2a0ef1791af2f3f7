"""`bvpo doctor`: is this environment able to run BVPO, and if not, what is missing."""

import argparse
import importlib.util
import os
import shutil
import sys

import megatron_bvpo
from megatron_bvpo.launching import argv, versions


def add_command(commands) -> argparse.ArgumentParser:
    """Register `doctor` with the subparsers of `bvpo`; returns its parser, for more options."""
    parser = commands.add_parser(
        "doctor",
        help="say whether this environment can run BVPO",
        description="Print versions, device and route. Exit code 0: a BVPO run can start here; 1: it cannot.",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    print(f"megatron-bvpo {megatron_bvpo.__version__}, Python {sys.version.split()[0]}")
    ready = [_versions(), _route(), _device()]
    print("A BVPO run can start here." if all(ready) else "A BVPO run cannot start here.")
    return 0 if all(ready) else 1


def _line(ok: bool, what: str, found: str) -> None:
    print(f"  {'ok     ' if ok else 'PROBLEM'}  {what:<20} {found}")


def _versions() -> bool:
    findings = versions.findings()
    for finding in findings:
        row = finding.row
        found = finding.found or "missing"
        note = "" if finding.ok else f"; {row.why}. pip install '{row.package}{row.specifier}'"
        _line(finding.ok, row.package, f"{found} (supported {row.specifier}, tested {row.tested}){note}")
    return all(finding.ok for finding in findings)


def _route() -> bool:
    """Whether `swift rlhf` will ask us. The hook names its own module; nothing of ms-swift is loaded."""
    hooked = any(getattr(f, "__module__", "") == "_megatron_bvpo_route" for f in sys.meta_path)
    command = shutil.which("swift") or shutil.which("swift", path=os.path.dirname(sys.executable))
    if hooked:
        _line(True, "route", "swift rlhf and megatron rlhf know --rlhf_type bvpo")
    else:
        _line(False, "route", "not active; use `python -m megatron_bvpo.cli rlhf …`, or install the package")
    if command is None:
        _line(False, "swift command", "neither on PATH nor beside this Python")
    return hooked and command is not None


def _device() -> bool:
    try:
        import torch
    except ImportError as error:
        _line(False, "device", f"torch cannot be imported: {error}")
        return False
    engine = importlib.util.find_spec("transformer_engine") is not None
    engine_version = versions.installed("transformer-engine") or ("present" if engine else "missing")
    count = torch.cuda.device_count()
    if count:
        _line(True, "device", f"{count} × {torch.cuda.get_device_name(0)}")
        _line(engine, "transformer-engine", engine_version)
        return engine
    rehearsal = argv.rehearsal_requested()
    _line(
        rehearsal,
        "device",
        "no CUDA device" + ("; rehearsal on CPU" if rehearsal else "; BVPO_REHEARSAL=1 rehearses"),
    )
    return rehearsal
