"""Which tokens of a pack a context-parallel rank gets from ms-swift, and to which sequence they are credited."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)

import swift.megatron.pipelines.train.rlhf  # noqa: E402, F401  (first: the other order breaks its parser)
from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from swift.megatron.utils import get_batch_on_this_cp_rank, get_packed_seq_params  # noqa: E402

from megatron_bvpo.objective.stream_losses import sequence_sums  # noqa: E402
from megatron_bvpo.training.passes import own_lengths  # noqa: E402

LENGTHS = (16, 4, 12, 8)  # each in 2·CP equal parts


def credited(monkeypatch, partition: str, cp_size: int) -> list[list[int]]:
    """How many tokens of each sequence (columns) are credited to each one (rows), over all ranks."""
    args = SimpleNamespace(cp_partition_mode=partition, is_multimodal=False, task_type="causal_lm")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    whose = torch.cat([torch.full((length,), i) for i, length in enumerate(LENGTHS)])[None]
    counts = torch.zeros(len(LENGTHS), len(LENGTHS))
    for rank in range(cp_size):
        monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: cp_size)
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        packed = get_packed_seq_params(args, positions)
        packed.seq_lens = torch.tensor(LENGTHS)
        labels = get_batch_on_this_cp_rank(args, {"labels": whose.clone(), "packed_seq_params": packed})["labels"]
        for i in range(len(LENGTHS)):
            counts[:, i] += sequence_sums((labels == i).float(), own_lengths(packed, cp_size))
    return counts.int().tolist()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_zigzag_parts_are_credited_to_their_own_sequences(monkeypatch, cp_size):
    assert credited(monkeypatch, "zigzag", cp_size) == torch.diag(torch.tensor(LENGTHS)).tolist()


def test_contiguous_parts_would_be_credited_to_other_sequences(monkeypatch):
    """Why `--cp_partition_mode contiguous` is refused: the first rank holds the first two sequences."""
    assert credited(monkeypatch, "contiguous", 2) == [[8, 0, 8, 0], [2, 0, 2, 0], [6, 0, 2, 4], [0, 4, 0, 4]]


def test_attention_is_not_told_of_contiguous_parts():
    """And what the ranks hold would be attended to as if it were zigzag: megatron-core has no field to say so."""
    assert "cp_partition_mode" not in {field.name for field in dataclasses.fields(PackedSeqParams)}
