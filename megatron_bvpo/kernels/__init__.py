"""Log-probabilities of target tokens from hidden states, without the [tokens, vocabulary] logits.

Needs torch; Triton only where the Triton path is chosen. Nothing here knows of megatron, swift or
transformer_engine, and importing this package needs neither a GPU nor Triton.
"""

from megatron_bvpo.kernels.logprob import Shard, target_logps, vocabulary_shard

__all__ = ["Shard", "target_logps", "vocabulary_shard"]
