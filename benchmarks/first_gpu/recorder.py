"""What is written down of each step, by every rank, and how the ranks' parts are put together."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

NAME = "first-gpu-{rank}.json"


def record(base, folder: Path, starve: bool = False, save: bool = False, fault: float = 0.0):
    """A trainer class that keeps losses, gradient norms and every sequence's log-probs, in full precision.

    Args:
        starve: the second half of the experts never gets a token.
        save: checkpoints are written.
        fault: every rank of the last pipeline stage scales its final norm by 1 + fault: what a test plants.
    """
    import torch.distributed as dist

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            losses = self.passes.losses
            object.__setattr__(losses, "of", partial(self._keep_logps, losses.of))  # it is frozen

        def save_checkpoint(self):
            if save:
                super().save_checkpoint()
            else:
                self.state.last_model_checkpoint = str(folder)

        def setup_model_training(self):
            super().setup_model_training()
            self.recorded, self.logps, self.starved_tokens = [], {}, 0
            if starve:
                starve_experts(self)
            if fault:
                for model in self.unwrapped_models:
                    if model.post_process:
                        model.decoder.final_layernorm.weight.data.mul_(1 + fault)

        def _keep_logps(self, stock, stream, responses, layout):
            logps_Q, ref_logps_Q = responses.logps_Q, responses.ref_logps_Q
            chosen, rejected = layout.slices(stream)
            kept = [logps_Q[chosen], logps_Q[rejected], ref_logps_Q[chosen], ref_logps_Q[rejected]]
            for row, *values in zip(layout.rows[stream], *(k.detach().tolist() for k in kept), strict=True):
                self.logps[f"{row} {stream}"] = values
            return stock(stream, responses, layout)

        def train_step(self, train_data_iterator):
            self.logps = {}
            metrics, grad_norm, successful = super().train_step(train_data_iterator)
            line = {"step": self.state.iteration + 1, "grad_norm": float(grad_norm), "successful": bool(successful)}
            for name in ("loss", "alpha"):
                for found in metrics:
                    total, count = (float(part) for part in found[name])
                    line[name] = total / count
            self.recorded.append({**line, "logps": self.logps, "starved_tokens": self.starved_tokens})
            return metrics, grad_norm, successful

        def finalize_training(self):
            super().finalize_training()
            file = folder / NAME.format(rank=dist.get_rank())
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(self.recorded))
            partial.rename(file)

    return Recorder


def starve_experts(trainer) -> None:
    """No router of the model chooses from the second half of the experts; tokens that reach it are counted."""
    from megatron.core.transformer.moe.router import TopKRouter

    def deaf(router):
        gating, routing = router.gating, router.routing

        def forward_gating(*args, **kwargs):
            logits = gating(*args, **kwargs)
            half = logits.shape[-1] // 2
            barred = logits.new_zeros(logits.shape[-1])
            barred[half:] = -1e4
            return logits + barred

        def forward_routing(*args, **kwargs):
            found = routing(*args, **kwargs)
            half = found[1].shape[-1] // 2
            trainer.starved_tokens += int(found[1][..., half:].sum())
            return found

        router.gating, router.routing = forward_gating, forward_routing

    for model in (*trainer.unwrapped_models, *trainer.ref_models):
        for module in model.modules():
            if isinstance(module, TopKRouter):
                deaf(module)


def complete(folder: Path, ranks: int) -> bool:
    """Whether every rank of a run came to its end."""
    return all((folder / NAME.format(rank=rank)).is_file() for rank in range(ranks))


def merged(folder: Path, ranks: int) -> list[dict]:
    """The steps of a run, with the log-probs of all data-parallel ranks and the last stage's loss."""
    parts = [json.loads((folder / NAME.format(rank=rank)).read_text()) for rank in range(ranks)]
    steps = []
    for lines in zip(*parts, strict=True):
        whole = {"logps": {}, "starved_tokens": 0}
        for line in lines:
            whole["logps"] |= line.pop("logps")
            whole["starved_tokens"] += line.pop("starved_tokens")
            whole |= line
        steps.append(whole)
    return steps
