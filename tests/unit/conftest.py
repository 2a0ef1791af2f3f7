"""Small inputs that several test files take."""

from __future__ import annotations

import pytest


@pytest.fixture
def prompts(tmp_path):
    """A file of six prompts to sample."""
    from tests.unit.sample_runs import write_prompts

    return write_prompts(tmp_path / "prompts.jsonl", 6)


@pytest.fixture
def row_cache(tmp_path_factory, monkeypatch):
    """Where kept rows are left for the loading: a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes bytes into a file of the test's folder and returns its path."""

    def write(content, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write
