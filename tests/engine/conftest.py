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
    """A folder with judged samples of three modes in `samples`."""
    from tests.engine import reasoner_pairs as way

    home = tmp_path_factory.mktemp("sampled")
    way.sample(home, "samples", way.PROMPTS, 5, "heldout", way.SAMPLES, way.MODES)
    return home


@pytest.fixture(scope="session")
def paired(tmp_path_factory) -> Path:
    """A folder with pairs.jsonl and pairs_heldout.jsonl."""
    from tests.engine.reasoner_pairs import pairs

    home = tmp_path_factory.mktemp("paired")
    pairs(home)
    return home


@pytest.fixture(scope="session")
def trained(paired):
    """The run on the pairs."""
    from tests.engine.reasoner_pairs import train

    return train(paired)
