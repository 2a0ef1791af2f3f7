"""The shards of reference log-probs on disk: exact, whole or not there, and never another pair's value."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bvpo.data.reference_cache import PAIR_BYTES, ReferenceShards, pair_key

tokens = st.lists(st.integers(-100, 2**31), max_size=5)


def key(i: int) -> bytes:
    return pair_key([i], [i], [i + 1], [i + 1])


@pytest.fixture
def shards(tmp_path):
    return ReferenceShards(tmp_path / "reference", {"files": {}})


def test_values_come_back_to_the_last_bit(shards):
    values = {key(0): (-1234.567890123456789, -0.1), key(1): (-1e-300, -3e5)}
    shards.write(values)
    assert shards.read() == values


def test_shards_add_up_and_the_oldest_wins(shards):
    shards.write({key(0): (-1.0, -2.0)})
    shards.write({key(0): (-9.0, -9.0), key(1): (-3.0, -4.0)})
    assert shards.read() == {key(0): (-1.0, -2.0), key(1): (-3.0, -4.0)}


def test_two_runs_that_share_a_folder_agree(tmp_path):
    one, two = (ReferenceShards(tmp_path / "reference", {"files": {}}) for _ in range(2))
    one.write({key(0): (-1.0, -2.0)})
    two.write({key(0): (-1.5, -2.5), key(2): (-5.0, -6.0)})
    assert one.read() == two.read() == {key(0): (-1.0, -2.0), key(2): (-5.0, -6.0)}


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_a_partial_shard_costs_its_own_pairs(shards, kept):
    shards.write({key(0): (-1.0, -2.0)})
    path = shards.write({key(i): (-3.0, -4.0) for i in range(1, 500)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert shards.read() == {key(0): (-1.0, -2.0)}


def test_a_flipped_bit_is_no_value(shards):
    shards.write({key(0): (-1.0, -2.0)})
    path = shards.write({key(i): (-float(i), -4.0) for i in range(1, 2000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert shards.read() == {key(0): (-1.0, -2.0)}


def test_a_file_of_another_kind_is_skipped(shards):
    from datasets import Dataset

    shards.write({key(0): (-1.0, -2.0)})
    Dataset.from_dict({"pair": ["text"], "score": [1.0]}).to_parquet(str(shards.folder / "other.parquet"))
    Dataset.from_dict({"pair": [b"short"], "chosen_logp": [1.0], "rejected_logp": [1.0]}).to_parquet(
        str(shards.folder / "short.parquet")
    )
    assert shards.read() == {key(0): (-1.0, -2.0)}


def test_values_that_are_not_finite_are_not_read(shards):
    shards.write({key(0): (float("nan"), -2.0), key(1): (-1.0, float("-inf")), key(2): (-1.0, -2.0)})
    assert shards.read() == {key(2): (-1.0, -2.0)}


def _write_for_ever(folder, started):
    shards = ReferenceShards(folder, {"files": {}})
    i = 0
    while True:
        shards.write({key(j): (-float(j), -1.0) for j in range(i, i + 50)})
        i += 50
        started.set()


def test_a_killed_writer_loses_its_last_shard_only(tmp_path):
    folder = tmp_path / "reference"
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    writer = context.Process(target=_write_for_ever, args=(folder, started), daemon=True)
    writer.start()
    assert started.wait(120)
    time.sleep(0.2)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    found = ReferenceShards(folder, {"files": {}}).read()
    assert found and len(found) % 50 == 0
    assert found == {key(j): (-float(j), -1.0) for j in range(len(found))}


@given(tokens, tokens, tokens, tokens)
def test_other_tokens_are_another_pair(a, b, c, d):
    first = pair_key(a, b, c, d)
    assert len(first) == PAIR_BYTES
    for other in ([*a, 1], b, c, d), (a, [*b, 1], c, d), (a, b, [*c, 1], d), (a, b, c, [*d, 1]), ([1, *a], b, c, d):
        assert pair_key(*other) != first
    if a and b:  # a token that moves over the border is another pair
        assert pair_key(a[:-1], [a[-1], *b], c, d) != first
