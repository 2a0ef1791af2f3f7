"""From per-token log-probs to the preference loss: pure functions of tensors, no host framework."""
