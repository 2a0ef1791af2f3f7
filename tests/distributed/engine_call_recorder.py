"""A trainer that keeps how the hosts call the stand-ins: which arguments, by position and by name."""

from __future__ import annotations

import functools
import json

import torch.distributed as dist

# Class → the methods that hosts call.
METHODS = {
    "Linear": ("__init__", "forward"),
    "LayerNormLinear": ("__init__", "forward"),
    "GroupedLinear": ("__init__", "forward"),
    "RMSNorm": ("__init__", "forward"),
    "DotProductAttention": ("__init__", "forward", "set_context_parallel_group"),
}
# Transformer Engine's function → the name under which megatron-core's moe_utils calls it.
FUNCTIONS = {
    "moe_permute_with_probs": "fused_permute_with_probs",
    "moe_unpermute": "fused_unpermute",
    "moe_sort_chunks_by_index": "fused_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs": "fused_sort_chunks_by_index_with_probs",
}


def record_calls(base, folder):
    """Writes calls_RANK.json: a list of [class or function, method, number of positional arguments, other names].

    The method of a function is the empty string.
    """
    import transformer_engine.pytorch as te
    from megatron.core.transformer.moe import moe_utils

    seen = set()

    def recorded(owner, name, what, method):
        original = vars(owner)[name]

        @functools.wraps(original)
        def call(*args, **kwargs):
            count = len(args) - bool(method)  # without self
            seen.add((what, method, count, tuple(sorted(kwargs))))
            return original(*args, **kwargs)

        setattr(owner, name, call)
        return owner, name, original

    kept = [recorded(getattr(te, c), m, c, m) for c, methods in METHODS.items() for m in methods]
    kept += [recorded(moe_utils, name, function, "") for function, name in FUNCTIONS.items()]

    class Recorder(base):
        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def finalize_training(self):
            super().finalize_training()
            for owner, name, original in kept:
                setattr(owner, name, original)
            (folder / f"calls_{dist.get_rank()}.json").write_text(json.dumps(sorted(seen)))

    return Recorder
