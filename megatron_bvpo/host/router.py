"""Router losses and counters, which belong to a step and not to the passes that measure its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def router_configs(models: Iterable[torch.nn.Module]) -> list:
    """The configurations that the routers of these models read; usually one object.

    A pipeline stage without a router has its model's too: all stages must decide alike.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    models = list(models)
    found = {id(model.config): model.config for model in models}
    found |= {id(m.config): m.config for model in models for m in model.modules() if isinstance(m, TopKRouter)}
    return list(found.values())


def has_router_losses(configs: list) -> bool:
    """True where an auxiliary or z-loss of the router adds to the gradient."""
    return any(c.num_moe_experts and (_coefficient(c.moe_aux_loss_coeff) or c.moe_z_loss_coeff) for c in configs)


def _coefficient(value) -> float:
    return max(value) if isinstance(value, (list, tuple)) else (value or 0.0)


@contextmanager
def router_at_rest(configs: list) -> Iterator[None]:
    """No auxiliary or z-loss."""
    with _restored(configs, "moe_aux_loss_coeff", "moe_z_loss_coeff"):
        for c in configs:
            aux = c.moe_aux_loss_coeff
            c.moe_aux_loss_coeff = [0.0] * len(aux) if isinstance(aux, (list, tuple)) else 0.0
            c.moe_z_loss_coeff = None
        yield


@contextmanager
def expert_bias_at_rest(configs: list) -> Iterator[None]:
    """`finalize_model_grads` leaves the expert bias and its counters alone.

    The counters keep counting, so that after all passes they have seen each token of the step once, and the
    bias moves only once it is known that the step is taken.
    """
    with _restored(configs, "moe_router_enable_expert_bias"):
        for c in configs:
            c.moe_router_enable_expert_bias = False
        yield


@contextmanager
def _restored(configs: list, *names: str) -> Iterator[None]:
    before = [[getattr(c, name) for name in names] for c in configs]
    try:
        yield
    finally:
        for c, values in zip(configs, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(c, name, value)


def clear_expert_counters(models: Iterable[torch.nn.Module]) -> None:
    """Forget the tokens counted so far: a pass that counts them all again follows."""
    for module in (m for model in models for m in model.modules()):
        if getattr(module, "local_tokens_per_expert", None) is not None:
            module.local_tokens_per_expert.zero_()


def update_expert_bias(models: list, configs: list) -> None:
    """Megatron's own update of the expert bias, once, from what the passes counted."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    if any(c.moe_router_enable_expert_bias for c in configs):
        _update_router_expert_bias(models, configs[0])
        clear_expert_counters(models)


def router_loss_sums() -> dict[str, torch.Tensor]:
    """What Megatron has summed up of the router's losses for the next line of the log."""
    return {name: values.clone() for name, values in _loss_tracker().items()}


def put_back_router_loss_sums(sums: dict[str, torch.Tensor]) -> None:
    """Forget what was added since `router_loss_sums`: a NaN of a skipped step would stay in the sum."""
    for name, values in _loss_tracker().items():
        values.copy_(sums[name] if name in sums else torch.zeros_like(values))


def _loss_tracker() -> dict[str, torch.Tensor]:
    """Megatron's own sums, by name; not copies."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:  # megatron-core before 0.18
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        return {name: entry["values"] for name, entry in get_moe_layer_wise_logging_tracker().items()}
    return {name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items()}
