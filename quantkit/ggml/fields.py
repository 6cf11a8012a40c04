"""Numbers that lie in the bytes of a block: halves, nibbles, fields of a few bits."""

from __future__ import annotations

import torch


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at byte `at` of every block, as float32 (n_rows, n_blocks, 1)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Take (..., n) bytes as (..., 2n) numbers: all low nibbles, then all high nibbles."""
    return torch.cat([packed & 15, packed >> 4], -1)


def join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Undo `nibbles`."""
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def bits(packed: torch.Tensor, n_bits: int, n_fields: int) -> torch.Tensor:
    """Take (..., n) bytes as (..., n_fields, n) numbers: field k holds bits k * n_bits
    and up of every byte."""
    mask = (1 << n_bits) - 1
    return torch.stack([(packed >> (n_bits * k)) & mask for k in range(n_fields)], -2)


def join_bits(fields: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Undo `bits`."""
    shifts = torch.arange(fields.shape[-2], device=fields.device, dtype=torch.uint8) * n_bits
    return (fields << shifts[:, None]).sum(-2, dtype=torch.uint8)
