"""What rounding explains, of micro-batches that hold nothing to compare."""

from __future__ import annotations

import torch

from megatron_bvpo.training.canaries import Rounding


def test_micro_batches_without_a_pair_count_nothing():
    empty, some = torch.zeros(0, dtype=torch.float64), torch.tensor([-3.0, -2.0], dtype=torch.float64)
    rounding, tokens = Rounding(1e-3, 4), torch.tensor([10.0, 10.0], dtype=torch.float64)
    assert rounding.excess([(empty, empty, empty)]) == (0.0, 0.0)
    pairs = [(some, some + 0.5, tokens)]
    assert rounding.excess([(empty, empty, empty), *pairs]) == rounding.excess(pairs)
    assert rounding.excess(pairs)[1] == 0.5
