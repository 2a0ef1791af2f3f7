"""These tests want a vLLM in an environment of its own, so they run only when they are asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    reason = None
    if not config.getoption("--vllm"):
        reason = "runs with --vllm only"
    elif not os.environ.get("BVPO_VLLM_PYTHON"):
        reason = "BVPO_VLLM_PYTHON is not set; launch/test.sh --vllm makes an environment with vLLM"
    if reason:
        for item in items:
            if "tests/engine/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def sampled(tmp_path_factory) -> Path:
    """The folder that `sample_and_pair` filled."""
    from tests.engine.reasoner_pairs import sample_and_pair

    home = tmp_path_factory.mktemp("vllm")
    sample_and_pair(home)
    return home


@pytest.fixture(scope="session")
def trained(sampled):
    """The run on its pairs."""
    from tests.engine.reasoner_pairs import train

    return train(sampled)
