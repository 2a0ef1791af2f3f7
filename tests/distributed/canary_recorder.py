"""Trainer classes that plant faults which no curve shows, and keep what the canaries say of each.

The faults are planted and taken away again in one run: the questions are asked anew for each.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from swift.utils import get_logger

from tests.distributed.exact_recorder import fingerprint, parameters, random_states
from tests.distributed.hooks import around

PREFIX = "Canary:"


@contextmanager
def canary_lines():
    """The warnings of the canaries on this rank while the block runs (ms-swift's logger speaks on rank 0)."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith(PREFIX):
                lines.append(record.getMessage())

    ear = Ear(logging.WARNING)
    get_logger().addHandler(ear)
    try:
        yield lines
    finally:
        get_logger().removeHandler(ear)


# ---- faults of the reference


@contextmanager
def set_to(owner, **values):
    """Attributes of `owner` itself, taken away again."""
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)


@contextmanager
def replaced(owner, **values):
    """Attributes of `owner` that it has itself, given back."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def adapters_on(trainer):
    """The reference's forward without `disable_adapter`; for full tuning, with the policy's own weights."""
    return replaced(trainer.passes, reference_models=lambda: nullcontext(trainer.unwrapped_models))


@contextmanager
def router_on(trainer):
    """The adapter of the router alone stays on in the reference's forward: what host/patches.py mends."""
    from mcore_bridge import LoraParallelLinear

    mended = LoraParallelLinear._patch_router_gating
    LoraParallelLinear._patch_router_gating = mended.__wrapped__
    try:
        yield
    finally:
        LoraParallelLinear._patch_router_gating = mended


def swapped_halves(trainer):
    stock = trainer.passes.loss
    return set_to(trainer.passes, loss=lambda c, output, **more: stock(c, torch.cat(output.chunk(2)[::-1]), **more))


@contextmanager
def swapped_between_stages(trainer):
    """What the second stage takes for the reference's activations are the policy's; no fault without a pipeline."""
    with ExitStack() as stack:
        for model in trainer.unwrapped_models:
            stock = model.get_input_tensor

            def get_input_tensor(stock=stock):
                found = stock()
                joined = found is not None and found.shape[0] % 2 == 0
                return torch.cat(found.chunk(2)[::-1]) if joined else found

            stack.enter_context(set_to(model, get_input_tensor=get_input_tensor))
        yield


@contextmanager
def adapters_off(trainer):
    with ExitStack() as stack:
        for model in trainer.peft_models:
            stack.enter_context(model.disable_adapter())
        yield


@contextmanager
def other_reference(trainer):
    """A reference model that was loaded from elsewhere: one norm is off by a tenth."""
    with changed(next(p for n, p in trainer.ref_models[0].named_parameters() if "layernorm" in n), by=0.1):
        yield


@contextmanager
def damaged_cache(trainer):
    good = trainer.references.table
    damaged = {key: (chosen + 1.0, rejected) for key, (chosen, rejected) in good.items()}
    with replaced(trainer.references, table=damaged):
        yield


@contextmanager
def changed(tensor: torch.Tensor, by: float):
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(by)
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def plant_in_reference(base, folder, faults: list[str], flush_steps: int = 32, live_dropout: float = 0.0):
    """Ask the first step's canaries without a fault and with each of these functions' in turn; keep what they say.

    `live_dropout` is switched on in every layer behind the configuration's back, for the step itself.
    """
    import megatron_bvpo.training.referencing as referencing

    class Recorder(base):
        recorded: dict

        def __init__(self, *args, **kwargs):
            referencing.FLUSH_STEPS = flush_steps
            self.recorded = {"forwards": 0, "reference_forwards": 0}
            super().__init__(*args, **kwargs)
            for model in self.unwrapped_models if live_dropout else ():
                for module in model.modules():
                    if hasattr(module, "hidden_dropout"):
                        module.hidden_dropout = live_dropout

            around(self.passes, "forward", partial(self._counted, "forwards"))
            around(self.passes, "reference_forward", partial(self._counted, "reference_forwards"))
            around(self.canaries, "ask", self._ask)

        def _counted(self, what, stock, *args):
            self.recorded[what] += 1
            return stock(*args)

        def _ask(self, stock, chunks, step, *, resumed):
            told = {}
            before = self._state()
            counts = self.recorded["forwards"], self.recorded["reference_forwards"]
            for name in ["", *faults]:
                with canary_lines() as lines, globals()[name](self) if name else nullcontext():
                    stock(chunks, step, resumed=resumed)
                told[name] = list(lines)
                if not name:
                    now = self.recorded["forwards"], self.recorded["reference_forwards"]
                    self.recorded["cost"] = [b - a for a, b in zip(counts, now, strict=True)]
            self.recorded |= {"told": told, "left_as_it_was": self._state() == before}

        def _state(self):
            gradients = {f"{i}": b.grad_data for i, b in enumerate(self.wrapped_models[0].buffers)}
            modes = [module.training for model in self.wrapped_models for module in model.modules()]
            return fingerprint(parameters(self)), fingerprint(gradients), fingerprint(random_states()), modes

        def save_checkpoint(self):
            self.state.last_model_checkpoint = str(folder)

        def finalize_training(self):
            super().finalize_training()
            if dist.get_rank() == 0:
                torch.save(self.recorded, folder / "recorded.pt")

    return Recorder


# ---- faults of copies


def plant_in_copies(base, folder, faults: dict[str, tuple[str, float]], at_save: tuple[str, float] | None = None):
    """Change one parameter on rank 1 alone, once for each of `faults`: (part of its name, what each element gets more).

    `at_save` is changed on rank 1 before the run's last save, which is written.
    """

    class Recorder(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found = {"": self.replicas.differences()}
            for name, fault in faults.items():
                with self._changed(*fault):
                    found[name] = self.replicas.differences()
            self.recorded = {"found": {name: [vars(d) for d in told] for name, told in found.items()}}

        def _changed(self, part: str, by: float):
            return changed(self._named(part), by) if dist.get_rank() == 1 else nullcontext()

        def _named(self, part: str):
            return next(p for n, p in self.unwrapped_models[0].named_parameters() if part in n)

        def save_checkpoint(self):
            if not at_save:
                self.state.last_model_checkpoint = str(folder)
                return
            with canary_lines() as lines, self._changed(*at_save):
                super().save_checkpoint()
            self.recorded["told"] = list(lines)

        def finalize_training(self):
            super().finalize_training()
            if dist.get_rank() == 0:
                torch.save(self.recorded, folder / "recorded.pt")

    return Recorder


def own_draws(base, folder):
    """LoRA's A as mcore-bridge draws it, with default generators that differ from rank to rank."""
    import megatron_bvpo.training.trainer as ours

    class Recorder(base):
        def _prepare_peft_model(self, models):
            mended, ours.draw_lora_a = ours.draw_lora_a, lambda *args: None
            torch.manual_seed(1000 + dist.get_rank())
            try:
                return super()._prepare_peft_model(models)
            finally:
                ours.draw_lora_a = mended

    return Recorder
