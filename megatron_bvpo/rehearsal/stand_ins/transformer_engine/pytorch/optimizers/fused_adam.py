"""Adam and AdamW with TE's interface: one step counter per parameter group, states in float32.

That counter is what Megatron's distributed optimizer saves and restores; torch's AdamW keeps one per
parameter, and resuming with it fails.
"""

from __future__ import annotations

from itertools import chain

import torch

_STATES = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p -= lr * (m/c1 / (sqrt(v/c2) + eps) + wd * p).

    c1 = 1 - b1^step, c2 = 1 - b2^step, or 1 without `bias_correction`. With `adam_w_mode=False` the weight
    decay is added to the gradient instead. All in float32; parameters may be bf16.

    Args:
        master_weights: keep float32 copies of bf16 parameters as state "master_param" and update those.
        use_decoupled_grad: read `param.decoupled_grad` instead of `param.grad`.
        exp_avg_dtype, exp_avg_sq_dtype: dtype the states are stored in, float32 or bfloat16.

    Raises:
        NotImplementedError: options that exist only for FP8, float16 states or CUDA graphs.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ):
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if capturable:
            raise NotImplementedError(
                "FusedAdam(capturable=True) is for CUDA graphs; set --optimizer_cuda_graph false."
            )
        if store_param_remainders and master_weights:
            raise NotImplementedError(
                "FusedAdam(store_param_remainders=True) is not in the transformer_engine stand-in; it needs "
                "--use_precision_aware_optimizer false."
            )
        for what, dtype in (("exp_avg_dtype", exp_avg_dtype), ("exp_avg_sq_dtype", exp_avg_sq_dtype)):
            if dtype not in (torch.float32, torch.bfloat16):
                raise NotImplementedError(f"FusedAdam({what}={dtype}): the stand-in has float32 and bfloat16 states.")
        if master_weights and master_weight_dtype != torch.float32:
            raise NotImplementedError(f"FusedAdam(master_weight_dtype={master_weight_dtype}): only float32.")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.capturable = False
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = False
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": torch.float32,
        }

    # ------------------------------------------------------------------------------------------------ states

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Zero moments, and a float32 copy of the parameter with `master_weights`."""
        state = self.state[param]
        for name in _STATES:
            state[name] = torch.zeros_like(param.data, dtype=self.name_to_dtype_map[name])
        if self.master_weights:
            state["master_param"] = param.detach().clone().float()

    def get_unscaled_state(self, param: torch.Tensor, state_name: str, skip_unscale: bool = False) -> torch.Tensor:
        """The state in float32 (in its own dtype with `skip_unscale`)."""
        state = self.state[param][state_name]
        return state if skip_unscale else state.float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        """Store a float32 state in the dtype it is kept in."""
        if unscaled_state.dtype != torch.float32:
            raise ValueError(f"the state {state_name!r} to set must be float32, it is {unscaled_state.dtype}.")
        state = self.state[param]
        if state_name not in state:
            state[state_name] = torch.empty_like(param.data, dtype=self.name_to_dtype_map[state_name])
        state[state_name].copy_(unscaled_state)

    def state_dict(self) -> dict:
        """torch's state dict with all states in float32."""
        saved = super().state_dict()
        saved["state"] = {
            key: {name: value.float() if torch.is_tensor(value) else value for name, value in state.items()}
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """torch casts states to the parameter's dtype; keep the dtype of the states instead."""
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved_ids, params, strict=True):
            if key not in state_dict["state"]:
                continue
            self.state[param] = {}
            for name, value in state_dict["state"][key].items():
                if value is not None:
                    self.set_scaled_state(param, name, value.to(param.device, torch.float32))

    # -------------------------------------------------------------------------------------------------- step

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        set_to_none = True if set_to_none is None else set_to_none
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none=set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                if set_to_none:
                    param.decoupled_grad = None
                else:
                    param.decoupled_grad.zero_()

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        if grad_scaler is not None:
            raise NotImplementedError("FusedAdam.step(grad_scaler=...) is not in the transformer_engine stand-in.")
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            # Also for groups that are empty on this rank: the counter is the same on all ranks.
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if len(self.state[param]) == 0:
                    self.initialize_state(param)
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is not None:
                    self._update(param, grad.float(), self.state[param], group)
        return loss

    def _update(self, param, grad, state, group) -> None:
        beta1, beta2 = group["betas"]
        step = group["step"]
        correction1 = 1 - beta1**step if group["bias_correction"] else 1.0
        correction2 = 1 - beta2**step if group["bias_correction"] else 1.0
        weight = state["master_param"] if "master_param" in state else param.data.float()
        if not self.adam_w_mode:
            grad = grad + group["weight_decay"] * weight
        m = state["exp_avg"].float().mul_(beta1).add_(grad, alpha=1 - beta1)
        v = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (m / correction1) / ((v / correction2).sqrt_() + group["eps"])
        if self.adam_w_mode:
            update = update + group["weight_decay"] * weight
        weight = weight - group["lr"] * update
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        if "master_param" in state:
            state["master_param"].copy_(weight)
        param.data.copy_(weight)
