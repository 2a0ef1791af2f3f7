"""FP8 state: always off. Asking for it raises."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager

_REMEDY = "the transformer_engine stand-in has no FP8: leave --fp8_format unset (and --fp8_param false)."


class FP8GlobalStateManager:
    """Answers "no FP8" to every question Megatron asks."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return False

    @classmethod
    def fp8_graph_capturing(cls) -> bool:
        return False

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        return False

    @classmethod
    def set_skip_fp8_weight_update_tensor(cls, skip) -> None:
        pass

    @classmethod
    def get_fp8_recipe(cls):
        raise NotImplementedError(_REMEDY)

    @classmethod
    def reset(cls) -> None:
        pass


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    """A region without FP8; `enabled=True` raises NotImplementedError."""
    if enabled or calibrating:
        raise NotImplementedError(f"fp8_autocast(enabled={enabled}, calibrating={calibrating}): {_REMEDY}")
    yield


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    """Parameters in their own dtype; `enabled=True` raises NotImplementedError."""
    if enabled:
        raise NotImplementedError(f"fp8_model_init(enabled=True): {_REMEDY}")
    yield


class autocast(AbstractContextManager):
    """fp8_autocast under its newer name and with that one's parameters."""

    def __init__(self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False):
        if enabled or calibrating:
            raise NotImplementedError(f"autocast(enabled={enabled}, calibrating={calibrating}): {_REMEDY}")

    def __exit__(self, *exception) -> None:
        return None


quantized_model_init = fp8_model_init


def check_fp8_support() -> tuple[bool, str]:
    return False, _REMEDY


def check_mxfp8_support() -> tuple[bool, str]:
    return False, _REMEDY
