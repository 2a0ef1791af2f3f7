"""Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are defined."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms want it, before CUDA starts


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def gpu_rounding(monkeypatch):
    """bf16 factors stay bf16 between the products on the CPU too, as they do on a GPU: same roundings there."""
    if torch.cuda.is_available():
        return
    from megatron_bvpo.kernels import fused_logprob, torch_logprob, triton_logprob

    def product(a, b, out=None):
        exact = a.float() @ b.float()
        return exact if out is None else out.copy_(exact)

    for module in (torch_logprob, triton_logprob, fused_logprob):
        monkeypatch.setattr(module, "operand", lambda x: x)
        monkeypatch.setattr(module, "product", product)
