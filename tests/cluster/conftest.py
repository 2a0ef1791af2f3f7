"""These tests start daemons and make network namespaces, so they run only when they are asked for."""

from __future__ import annotations

import os

import pytest

from tests.cluster.slurm_cluster import ONE_ADDRESS, SlurmCluster, missing_programs


def pytest_collection_modifyitems(config, items):
    if config.getoption("--cluster"):
        return
    for item in items:
        if "tests/cluster/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="runs with --cluster only"))


@pytest.fixture(scope="module")
def slurm(request, tmp_path_factory):
    """A cluster for a module, with the addresses that it names in ADDRESSES."""
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm (apt-get install slurmctld slurmd slurm-client munge); missing: {missing}")
    addresses = getattr(request.module, "ADDRESSES", ONE_ADDRESS)
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", addresses) as cluster:
        yield cluster
