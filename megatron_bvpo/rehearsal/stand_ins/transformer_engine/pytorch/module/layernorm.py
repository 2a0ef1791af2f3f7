"""LayerNorm as a layer of its own."""

from __future__ import annotations

import torch

from .normalization import layer_norm
from .rmsnorm import RMSNorm


class LayerNorm(RMSNorm):
    """x [..., H] -> [..., H] in the weight's dtype, normalised to mean 0 and variance 1. Same arguments as RMSNorm."""

    def _make_parameters(self, shape: tuple[int, ...], factory: dict) -> None:
        super()._make_parameters(shape, factory)
        self.bias = torch.nn.Parameter(torch.empty(shape, **factory))

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        super().reset_parameters()
        if self.bias.device.type != "meta":
            torch.nn.init.zeros_(self.bias)
        if self.sequence_parallel is not None:
            self.bias.sequence_parallel = self.sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input.to(self.weight.dtype), self.weight, self.bias, self.eps, self.zero_centered_gamma)
