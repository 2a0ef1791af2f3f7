"""SGD with TE's constructor."""

from __future__ import annotations

import torch


class FusedSGD(torch.optim.SGD):
    """torch's SGD: momentum, dampening, Nesterov, weight decay before the momentum."""

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool | None = None,
    ):
        if wd_after_momentum:
            raise NotImplementedError("FusedSGD(wd_after_momentum=True) is not in the transformer_engine stand-in.")
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
