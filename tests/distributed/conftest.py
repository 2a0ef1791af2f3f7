"""Runs that several test files look at, made once a session."""

from __future__ import annotations

import pytest

from tests.distributed import oracle_runs
from tests.distributed.hf_oracle import Oracle


@pytest.fixture(scope="session")
def saved_runs(workshop, tmp_path_factory):
    """LoRA runs on the MoE and on the dense model, each with a first step on record and a checkpoint."""
    return oracle_runs.run_saved(workshop, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def oracle(workshop) -> Oracle:
    """The dense model in float64, with another one as its reference."""
    return Oracle(workshop.dense, reference=oracle_runs.other_dense(workshop))


@pytest.fixture(scope="session")
def packings(workshop, tmp_path_factory):
    """One step of full tuning over the same pairs, batched in five ways."""
    return oracle_runs.run_packings(workshop, tmp_path_factory.mktemp("packings"))
