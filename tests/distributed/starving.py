"""A router that sends every token to the same few experts, so that all but the first rank of EP get none.

As many experts as each token takes: with a choice among more, tokens that are as near to one as to another would be
decided by rounding, which is another in every layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.distributed.recorders import record_probe


def record_starved_probe(base, folder, **hook_args):
    """record_probe; `rows` in rows.pt is, by rank, how many rows the experts got at each call."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.moe.router import TopKRouter

    routing, forward = TopKRouter.routing, TEGroupedMLP.forward
    rows = []

    def starving(self, logits, *args, **kwargs):
        out_of_reach = torch.zeros_like(logits)
        out_of_reach[..., self.config.moe_router_topk :] = -1e4
        return routing(self, logits + out_of_reach, *args, **kwargs)

    def counting(self, permuted_local_hidden_states, *args, **kwargs):
        rows.append(permuted_local_hidden_states.shape[0])
        return forward(self, permuted_local_hidden_states, *args, **kwargs)

    class Recorder(record_probe(base, folder, **hook_args)):
        def setup_model_training(self):
            TopKRouter.routing, TEGroupedMLP.forward = starving, counting
            super().setup_model_training()

        def finalize_training(self):
            super().finalize_training()
            TopKRouter.routing, TEGroupedMLP.forward = routing, forward
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows)
            if dist.get_rank() == 0:
                torch.save(gathered, folder / "rows.pt")

    return Recorder
