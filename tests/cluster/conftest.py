"""These tests start daemons and make network namespaces, so they run only when they are asked for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config, items):
    if config.getoption("--cluster"):
        return
    for item in items:
        if "tests/cluster/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="runs with --cluster only"))
