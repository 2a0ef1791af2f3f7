"""Tiny models and preference rows, made once a session."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

try:
    import hypothesis
except ModuleNotFoundError:  # a bare GPU machine: what needs it is skipped
    hypothesis = None

# The same random cases at every run of CI; a person's runs draw new ones.
if hypothesis is not None:
    hypothesis.settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="run every cell of the parity matrices (seven minutes and more a file) instead of CI's part of it",
    )
    parser.addoption(
        "--cluster",
        action="store_true",
        help="run tests/cluster too: a real Slurm, and hosts in network namespaces (root; several minutes)",
    )
    parser.addoption(
        "--vllm",
        action="store_true",
        help="run tests/engine too, with the vLLM of BVPO_VLLM_PYTHON (launch/test.sh --vllm makes one)",
    )


def pytest_configure(config):
    """What the tests' runs keep of their rows goes when the tests have ended, and never into a person's cache."""
    if "MODELSCOPE_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="bvpo-cache-", ignore_cleanup_errors=True)
        os.environ["MODELSCOPE_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


@dataclass(frozen=True)
class Workshop:
    """Where the session's tiny models and rows are."""

    folder: Path
    moe: Path
    dense: Path
    train: Path
    held_out: Path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """A tiny MoE, a tiny dense model (vocabulary of 1003 words: no layout divides it), 16 and 5 rows."""
    from megatron_bvpo.rehearsal.sample_data import make_sample_rows
    from megatron_bvpo.rehearsal.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("workshop")
    rows = make_sample_rows(21, seed=1)
    for name, part in (("train", rows[:16]), ("held_out", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return Workshop(
        folder=folder,
        moe=make_tiny_model(folder / "moe", kind="moe", vocab="trimmed", seed=0),
        dense=make_tiny_model(folder / "dense", kind="dense", vocab="trimmed", seed=0),
        train=folder / "train.jsonl",
        held_out=folder / "held_out.jsonl",
    )
