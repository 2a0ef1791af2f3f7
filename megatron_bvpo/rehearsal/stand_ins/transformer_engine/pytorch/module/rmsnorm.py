"""RMSNorm as a layer of its own."""

from __future__ import annotations

import torch

from .base import resolve_device
from .normalization import rms_norm


class RMSNorm(torch.nn.Module):
    """x [..., H] -> [..., H] in the weight's dtype, normalised by the root mean square.

    `hidden_size` and `params_dtype` are TE's older names of `normalized_shape` and `dtype`; Megatron uses
    them.
    """

    def __init__(
        self,
        normalized_shape=None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device="cuda",
        dtype: torch.dtype | None = None,
        sm_margin: int = 0,
    ):
        super().__init__()
        shape = hidden_size if normalized_shape is None else normalized_shape
        if shape is None:
            raise RuntimeError(f"{type(self).__name__} needs normalized_shape (or hidden_size).")
        self.eps = eps
        self.sequence_parallel = sequence_parallel
        self.zero_centered_gamma = zero_centered_gamma
        dtype = dtype or params_dtype or torch.get_default_dtype()
        factory = {"device": resolve_device(device), "dtype": dtype}
        self._make_parameters((shape,) if isinstance(shape, int) else tuple(shape), factory)
        self.reset_parameters()

    def _make_parameters(self, shape: tuple[int, ...], factory: dict) -> None:
        self.weight = torch.nn.Parameter(torch.empty(shape, **factory))

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        if self.weight.device.type != "meta":
            torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.sequence_parallel is not None:
            self.weight.sequence_parallel = self.sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # In the weight's dtype, whatever the input's, as TE does: with float32 residuals it is where bf16 begins.
        return rms_norm(input.to(self.weight.dtype), self.weight, self.eps, self.zero_centered_gamma)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        pass
