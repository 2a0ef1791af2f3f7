"""Random-state tracking and activation recomputation under TE's names."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

_all_rng_states: dict[str, torch.Tensor] = {}


def get_all_rng_states() -> dict[str, torch.Tensor]:
    return _all_rng_states


def set_all_rng_states(states: dict[str, torch.Tensor]) -> None:
    global _all_rng_states
    _all_rng_states = states


def _get_state() -> torch.Tensor:
    """State of the generator that dropout draws from: the GPU's, or the CPU's where there is none."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_state(state: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _seed(seed: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class CudaRNGStatesTracker:
    """Named random states; `fork(name)` runs a region with one of them, then returns to the outer one."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states
        set_all_rng_states(self.states_)

    def add(self, name: str, seed: int) -> None:
        if seed in self.seeds_:
            raise RuntimeError(f"random seed {seed} is already used by another state; give {name!r} its own.")
        if name in self.states_:
            raise RuntimeError(f"random state {name!r} already exists.")
        self.seeds_.add(seed)
        outer = _get_state()
        _seed(seed)
        self.states_[name] = _get_state()
        _set_state(outer)
        set_all_rng_states(self.states_)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng"):
        if name not in self.states_:
            raise KeyError(f"random state {name!r} was not added; known: {sorted(self.states_)}")
        outer = _get_state()
        _set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = _get_state()
            _set_state(outer)


@contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False):
    """Marks FP8 recomputation in TE; without FP8 there is nothing to mark."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def in_fp8_activation_recompute_phase() -> bool:
    return False


def checkpoint(
    function,
    *args,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker=None,
    tp_group=None,
    use_reentrant: bool = True,
    **kwargs,
):
    """Run `function` without keeping its activations and recompute them in the backward pass.

    The tracker's random states at the forward pass are restored for the recomputation, so dropout repeats.

    Raises:
        NotImplementedError: `distribute_saved_activations`.
    """
    if distribute_saved_activations:
        raise NotImplementedError(
            "checkpoint(distribute_saved_activations=True) is not in the transformer_engine stand-in. "
            "Set --distribute_saved_activations false."
        )
    if get_rng_state_tracker is None:
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
    states_at_forward = get_rng_state_tracker().get_states()
    first = True

    def run(*run_args, **run_kwargs):
        nonlocal first
        if first:
            first = False
            return function(*run_args, **run_kwargs)
        tracker = get_rng_state_tracker()
        states_now = tracker.get_states()
        tracker.set_states(dict(states_at_forward))
        try:
            return function(*run_args, **run_kwargs)
        finally:
            tracker.set_states(states_now)

    return torch_checkpoint(run, *args, use_reentrant=False, **kwargs)
