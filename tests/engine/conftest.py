"""These tests want a vLLM in an environment of its own, so they run only when they are asked for."""

from __future__ import annotations

import os

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
