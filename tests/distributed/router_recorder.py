"""Trainer classes that look at the router's bias, counters and losses, and at gradients over many dropout masks."""

from __future__ import annotations

import contextlib
import importlib
import sys

import torch
import torch.distributed as dist

from tests.distributed.recorders import record_first_step


def routers(trainer) -> list:
    from megatron.core.transformer.moe.router import TopKRouter

    return [m for model in trainer.unwrapped_models for m in model.modules() if isinstance(m, TopKRouter)]


def record_router(base, folder, mutation: str | None = None, save_rank: int = 0):
    """Each step's token counts, expert biases and own all-reduces, and the first step's gradients.

    `mutation` breaks the code on purpose: see `mutated`.
    """
    import megatron_bvpo.training.step as ours

    class Recorder(record_first_step(base, folder, lora_scale=0.02)):
        def train_step(self, train_data_iterator):
            if not hasattr(self, "router"):
                self.router = {"counts": [], "bias": [], "updates": [], "reductions": []}
            self.updates = 0
            with mutated(mutation), self._watched(), own_reductions() as reductions:
                done = super().train_step(train_data_iterator)
            self.router["bias"].append([r.expert_bias.clone() for r in routers(self) if r.expert_bias is not None])
            self.router["updates"].append(self.updates)
            self.router["reductions"].append(reductions)
            if dist.get_rank() == save_rank:
                torch.save(self.router, folder / "router.pt")
            return done

        @contextlib.contextmanager
        def _watched(self):
            # By its full name: the package has a function of the same name.
            megatrons = importlib.import_module("megatron.core.distributed.finalize_model_grads")
            update, change = ours.update_expert_bias, megatrons._update_router_expert_bias

            def counted(models, configs):
                found = [r.local_tokens_per_expert for r in routers(self) if r.local_tokens_per_expert is not None]
                self.router["counts"].append([c.clone() for c in found])
                update(models, configs)

            def changing(*args, **named):
                self.updates += 1
                change(*args, **named)

            ours.update_expert_bias, megatrons._update_router_expert_bias = counted, changing
            try:
                yield
            finally:
                ours.update_expert_bias, megatrons._update_router_expert_bias = update, change

    return Recorder


@contextlib.contextmanager
def own_reductions():
    """[(function, elements)] of the all-reduces that the project's own code asks for, beside Megatron's."""
    found, all_reduce = [], dist.all_reduce

    def watched(tensor, *args, **kwargs):
        code = sys._getframe(1).f_code
        if "/megatron_bvpo/" in code.co_filename:
            found.append((code.co_name, tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = watched
    try:
        yield found
    finally:
        dist.all_reduce = all_reduce


@contextlib.contextmanager
def mutated(mutation: str | None):
    """Faults that a person could make in host/router.py and where it is used."""
    import megatron_bvpo.training.probing as probing
    import megatron_bvpo.training.step as ours

    names = {
        "bias moves in every pass": (ours, "expert_bias_at_rest"),
        "router losses in every pass": (probing, "router_at_rest"),
    }
    if mutation is None:
        yield
        return
    module, name = names[mutation]
    saved = getattr(module, name)
    setattr(module, name, lambda configs: contextlib.nullcontext())
    try:
        yield
    finally:
        setattr(module, name, saved)


def record_over_seeds(base, folder, seeds: int, lora_scale: float = 0.3):
    """On one batch: the gradient of a one-pass step and of a probe step, each over `seeds` dropout masks.

    Saved as [seeds, E] with E elements of the gradient buffers; `plain` [E] is without dropout, and `broken` [2, E] the
    probe step with dropout off in its passes.
    """
    from megatron_bvpo.gradients import shards

    class Recorder(record_first_step(base, folder, lora_scale=lora_scale, gradients=False)):
        def train_step(self, train_data_iterator):
            chunks = self._take_global_batch(train_data_iterator)
            probe = self.probes.plan(chunks[0], self.state.iteration)
            slices = shards.gradient_slices(self.wrapped_models, tp_rank=0)

            def after(step, *args, seed: int) -> torch.Tensor:
                torch.manual_seed(seed)
                step(*args)
                return torch.cat([s.grad_E[a:b] for s in slices for a, b in s.counted]).double()

            one_pass, four = [], []
            for seed in range(seeds):
                one_pass.append(after(self.step.one_pass, chunks, 0, seed=2 * seed))
                four.append(after(self.probes.run, chunks, probe, 0, {}, seed=2 * seed + 1))
            with dropout_off(self.wrapped_models):
                plain = after(self.step.one_pass, chunks, 0, seed=0)
                broken = torch.stack([after(self.probes.run, chunks, probe, 0, {}, seed=seed) for seed in range(2)])
            found = {"one_pass": torch.stack(one_pass), "probe": torch.stack(four), "plain": plain, "broken": broken}
            torch.save(found, folder / "seeds.pt")
            return [], 0.0, False

    return Recorder


@contextlib.contextmanager
def dropout_off(models):
    """By its probability: `train()` after each reference forward would undo `eval()`."""
    modules = [m for model in models for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    before = [module.p for module in modules]
    assert any(before), "the model has no dropout that could be switched off"
    for module in modules:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(modules, before, strict=True):
            module.p = p
