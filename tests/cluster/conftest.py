"""These tests start daemons and make network namespaces, so they run only when they are asked for."""

from __future__ import annotations

import os

import pytest

from tests.cluster.slurm_cluster import SlurmCluster, missing_programs


def pytest_collection_modifyitems(config, items):
    if config.getoption("--cluster"):
        return
    for item in items:
        if "tests/cluster/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="runs with --cluster only"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm (apt-get install slurmctld slurmd slurm-client munge); missing: {missing}")
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster
