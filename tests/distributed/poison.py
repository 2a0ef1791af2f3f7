"""Trainer classes that put a NaN where a real run would get one, on top of `record_exactly`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.exact_recorder import exact, fingerprint, optimizer_tensors, record_exactly
from tests.distributed.hooks import around


def poisoned(
    base, folder: Path, steps: list[int], where: str, value: float = math.nan, rank: int | None = None, stop_after=None
):
    """In each of `steps`, on one rank only, put `value` into …

    Args:
        where: `trace` or `empty`: the log-prob of that stream's first chosen answer in the first micro-batch;
            `gradient`: one element of the finished gradients; `hidden`: the embeddings of the first micro-batch.
        rank: the rank, the last one by default. For log-probs it must be on the last pipeline stage.
        stop_after: in place of step.py's MAX_SKIPPED_STEPS.
    """
    import megatron_bvpo.training.step as ours

    if stop_after is not None:
        ours.MAX_SKIPPED_STEPS = stop_after

    class Poisoned(record_exactly(base, folder)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            around(self.passes.losses, "of", self._poison_logp)
            around(self.passes, "run", self._poison_gradient)

        def _here(self) -> bool:
            """Whether the next one is to be poisoned; true once a step."""
            chosen = dist.get_world_size() - 1 if rank is None else rank
            step = self.state.iteration + 1
            here = step in steps and dist.get_rank() == chosen and self.unwrapped_models[0].training
            if here and getattr(self, "poisoned_step", 0) != step:
                self.poisoned_step = step
                return True
            return False

        def train_step(self, train_data_iterator):
            self._write(
                state=self.state.iteration + 1,
                optimizer=fingerprint(optimizer_tensors(self)),
                scheduler=self.opt_param_scheduler.num_steps,
            )
            return super().train_step(train_data_iterator)

        def _poison_logp(self, stock, stream, responses, layout):
            chosen, *_ = layout.slices(stream)
            if where == stream and chosen.stop > chosen.start and self._here():
                logps_Q = responses.logps_Q.clone()
                logps_Q[chosen.start] = value
                responses = replace(responses, logps_Q=logps_Q)
                self._write(poisoned=layout.rows[stream][0])
            return stock(stream, responses, layout)

        def _poison_gradient(self, stock, *args, forward_only, **more):
            done = stock(*args, forward_only=forward_only, **more)
            if where == "gradient" and not forward_only and self._here():
                self.wrapped_models[0].buffers[0].grad_data.view(-1)[3] = value
            return done

        def prepare_model(self):
            super().prepare_model()
            if where == "hidden":
                for model in self.unwrapped_models:
                    embedding = getattr(model, "embedding", None)
                    if embedding is not None:
                        embedding.register_forward_hook(self._poison_hidden)

        def _poison_hidden(self, module, inputs, output):
            return torch.full_like(output, value) if torch.is_grad_enabled() and self._here() else output

        def on_log(self, logs, prefix=""):
            super().on_log(logs, prefix)
            names = ("load_balancing_loss", "loss", "grad_norm")
            self._write(log=self.state.iteration, **{k: exact(logs[k]) for k in names if k in logs})

    return Poisoned
