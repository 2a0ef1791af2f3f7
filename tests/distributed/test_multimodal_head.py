"""Models that register as multimodal (Qwen3.5 and later): fused log-probs are found at `.language_model`."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import multimodal_body
from tests.distributed.ranks import run_ranks

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_fused_log_probs_of_a_language_model_equal_whole_logits(kind):
    found = run_ranks(2, multimodal_body.whole_and_fused, kind, before=multimodal_body.install_stand_ins, timeout_s=240)
    for rank in found:
        assert rank["fused"]
        assert len(set(rank["names"])) == 2, "one delta net and one attention"
        whole, fused = rank["logps"]
        assert whole.std() > 0.1
        torch.testing.assert_close(fused, whole, rtol=TOLERANCE, atol=TOLERANCE)
        whole_gradients, fused_gradients = rank["gradients"]
        assert whole_gradients.keys() == fused_gradients.keys()
        assert any("output_layer" in name for name in whole_gradients)
        for name, gradient in whole_gradients.items():
            difference = (fused_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert difference < 1e-4, name
