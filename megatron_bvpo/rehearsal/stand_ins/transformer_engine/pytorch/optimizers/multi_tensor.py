"""Operations on lists of tensors with the calling convention of TE's multi-tensor kernels.

`multi_tensor_applier(operation, noop_flag, lists, *args)` calls `operation(chunk_size, noop_flag, lists,
*args)`. `noop_flag` is an int tensor [1] that an operation sets to 1 when it meets a number that is not
finite.
"""

from __future__ import annotations

import torch


class MultiTensorApply:
    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size

    def __call__(self, operation, noop_flag, tensor_lists, *args):
        if any(len(tensors) != len(tensor_lists[0]) for tensors in tensor_lists):
            raise RuntimeError(f"the tensor lists differ in length: {[len(tensors) for tensors in tensor_lists]}.")
        return operation(self.chunk_size, noop_flag, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor: bool = False):
    """2-norm of all tensors of tensor_lists[0] together: [1] float32; and each one's if `per_tensor`."""
    tensors = tensor_lists[0]
    if not tensors:
        empty = torch.zeros(1, dtype=torch.float32, device=noop_flag.device)
        return empty, empty
    # In float64: torch adds a CPU's float32 squares one after the other, which costs 1e-5 of the norm of a million.
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    total = torch.linalg.vector_norm(norms).float().reshape(1)
    norms = norms.float()
    if not torch.isfinite(total).all():
        noop_flag.fill_(1)
    return total, norms if per_tensor else norms.new_zeros(1)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale) -> None:
    """tensor_lists[1] = tensor_lists[0] * scale, in float32 and then in the target's dtype."""
    for source, target in zip(*tensor_lists, strict=True):
        scaled = source.float() * scale
        if not torch.isfinite(scaled).all():
            noop_flag.fill_(1)
        target.copy_(scaled)


def multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, scale: torch.Tensor) -> None:
    """multi_tensor_scale with the factor in a tensor [1]."""
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale)
