"""Padding of grouped inputs to the row multiples that FP8 products need; plain copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Fp8Padding(torch.nn.Module):
    """[sum(m_splits), H] -> ([sum(padded), H], padded): each block gets zero rows up to a multiple."""

    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = align_size or 16

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        padded = [-(-rows // self.align_size) * self.align_size for rows in m_splits]
        if padded == list(m_splits):
            return inp, padded
        blocks = torch.split(inp.reshape(-1, inp.shape[-1]), list(m_splits))
        blocks = [F.pad(block, (0, 0, 0, rows - block.shape[0])) for block, rows in zip(blocks, padded, strict=True)]
        return torch.cat(blocks), padded


class Fp8Unpadding(torch.nn.Module):
    """The inverse of Fp8Padding, given the original `m_splits`."""

    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = align_size or 16

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        padded = [-(-rows // self.align_size) * self.align_size for rows in m_splits]
        if padded == list(m_splits):
            return inp
        blocks = torch.split(inp, padded)
        return torch.cat([block[:rows] for block, rows in zip(blocks, m_splits, strict=True)])
