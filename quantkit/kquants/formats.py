"""Block formats whose values lie on a grid: where scales and codes sit in the bytes, both ways.

In all of them the value of a weight is `scale * level(code) + minimum`, with scale and minimum
shared by a group of 16 or 32 columns. `level(code)` is the code itself, or an entry of a table of
16 (IQ4). GPTQ keeps the scales that ggml chose and decides the codes; so a format reads grid and
codes out of packed rows and puts other codes in.

The layouts are those of ggml-common.h and of `dequantize_row_*` in ggml-quants.c. Tensors are
torch, on any device: packed rows are uint8 (n_rows, n_blocks, block_bytes), codes int16 (n_rows,
n_columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.qtypes import QuantType

# kvalues_iq4nl of ggml-common.h
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Grid:
    """The values that the rows of one packed tensor can take.

    `scale` and `minimum` are float32 (n_rows, n_columns / group). Codes run from `low` to `high`;
    with a `table`, a code is an index into it.
    """

    scale: torch.Tensor
    minimum: torch.Tensor
    group: int
    low: int
    high: int
    table: tuple[int, ...] | None = None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values of integer codes (n_rows, n_columns)."""
        levels = codes.float()
        if self.table is not None:
            levels = torch.tensor(self.table, dtype=torch.float32, device=codes.device)[
                codes.long()
            ]
        n_rows = codes.shape[0]
        grouped = levels.view(n_rows, -1, self.group)
        return (grouped * self.scale[..., None] + self.minimum[..., None]).view(n_rows, -1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of every block, as float32 (n_rows, n_blocks, 1)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(..., n) bytes -> (..., 2n): all low nibbles, then all high nibbles."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _bits(packed: torch.Tensor, n_bits: int, n_fields: int) -> torch.Tensor:
    """(..., n) bytes -> (..., n_fields, n): field k holds bits k * n_bits and up of every byte."""
    mask = (1 << n_bits) - 1
    return torch.stack([(packed >> (n_bits * k)) & mask for k in range(n_fields)], -2)


def _join_bits(fields: torch.Tensor, n_bits: int) -> torch.Tensor:
    shifts = torch.arange(fields.shape[-2], device=fields.device, dtype=torch.uint8) * n_bits
    return (fields << shifts[:, None]).sum(-2, dtype=torch.uint8)


class Format:
    """One block format. Subclasses say where things lie; sizes come from gguf's table."""

    group: int  # columns that share a scale
    low: int
    high: int
    offset = 0  # what is added to a code to store it unsigned
    table: tuple[int, ...] | None = None
    d_at = 0  # byte of the block's float16 scale d
    dmin_at: int | None = None  # byte of the block's float16 minimum or minimum scale
    dmin_sign = 1  # value = ... + dmin_sign * dmin * minimum code

    def __init__(self, name: str) -> None:
        self.qtype = QuantType(name)

    def blocks(self, packed: torch.Tensor) -> torch.Tensor:
        """uint8 (n_rows, row_bytes) -> (n_rows, n_blocks, block_bytes), a view."""
        return packed.view(packed.shape[0], -1, self.qtype.block_bytes)

    def grid(self, packed: torch.Tensor) -> Grid:
        """Scale and minimum of every group of packed rows (n_rows, row_bytes)."""
        blocks = self.blocks(packed)
        n_rows = packed.shape[0]
        scale_codes, minimum_codes = self.multipliers(blocks)
        scale = (_half(blocks, self.d_at) * scale_codes).reshape(n_rows, -1)
        minimum = torch.zeros_like(scale)
        if self.dmin_at is not None:
            minimum = (self.dmin_sign * _half(blocks, self.dmin_at) * minimum_codes).reshape(
                n_rows, -1
            )
        return Grid(scale, minimum, self.group, self.low, self.high, self.table)

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """int16 codes (n_rows, n_columns) of packed rows."""
        stored = self.stored_codes(self.blocks(packed)).to(torch.int16)
        return stored.reshape(packed.shape[0], -1) - self.offset

    def with_codes(self, packed: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """A copy of packed rows whose weights have other codes; scales stay."""
        blocks = self.blocks(packed).clone()
        stored = (
            (codes + self.offset).to(torch.uint8).view(*blocks.shape[:2], self.qtype.block_size)
        )
        self.store_codes(blocks, stored)
        return blocks.view(packed.shape)

    def with_scales(
        self, packed: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor | None
    ) -> torch.Tensor:
        """A copy of packed rows with other float16 `d` and `dmin`, (n_rows, n_blocks) each."""
        blocks = self.blocks(packed).clone()
        blocks[..., self.d_at : self.d_at + 2] = d.half()[..., None].view(torch.uint8)
        if dmin is not None and self.dmin_at is not None:
            blocks[..., self.dmin_at : self.dmin_at + 2] = dmin.half()[..., None].view(torch.uint8)
        return blocks.view(packed.shape)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integer scale and minimum codes per group, float32 (n_rows, n_blocks, groups per
        block).
        """
        one = torch.ones((), device=blocks.device).expand(*blocks.shape[:2], 1)
        return one, one

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """Unsigned codes as stored, uint8 (n_rows, n_blocks, block_size)."""
        raise NotImplementedError

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        """Write unsigned codes into `blocks` in place."""
        raise NotImplementedError


class FourBit(Format):
    """32 weights: d, (m,) 16 bytes of nibbles. Q4_0, Q4_1, IQ4_NL."""

    group = 32

    def __init__(self, name: str, low: int, table: tuple[int, ...] | None = None) -> None:
        super().__init__(name)
        self.low, self.high, self.offset, self.table = low, low + 15, -low, table
        self.dmin_at = 2 if name == "Q4_1" else None

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles(blocks[..., -16:])

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., -16:] = _join_nibbles(stored)


class FiveBit(Format):
    """32 weights: d, (m,) 4 bytes of fifth bits, 16 bytes of nibbles. Q5_0, Q5_1."""

    group = 32

    def __init__(self, name: str, low: int) -> None:
        super().__init__(name)
        self.low, self.high, self.offset = low, low + 31, -low
        self.dmin_at = 2 if name == "Q5_1" else None

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        fifth = (
            _bits(blocks[..., -20:-16], 1, 8).transpose(-1, -2).flatten(-2)
        )  # bit j belongs to weight j
        return _nibbles(blocks[..., -16:]) | (fifth << 4)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., -16:] = _join_nibbles(stored & 15)
        blocks[..., -20:-16] = _join_bits((stored >> 4).unflatten(-1, (4, 8)).transpose(-1, -2), 1)


class EightBit(Format):
    """32 weights: d, 32 signed bytes. Q8_0; -128 is left unused, as ggml does."""

    group, low, high = 32, -127, 127

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[..., 2:].contiguous().view(torch.int8)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 2:] = stored  # two's complement: the conversion to uint8 has already wrapped


class Q2K(Format):
    """256 weights: 16 bytes of 4-bit scales and minimums, 64 bytes of 2-bit codes, d, dmin."""

    group, low, high = 16, 0, 3
    d_at, dmin_at, dmin_sign = 80, 82, -1

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = blocks[..., 0:16]
        return (packed & 15).float(), (packed >> 4).float()

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return _bits(blocks[..., 16:80].unflatten(-1, (2, 32)), 2, 4).flatten(-3)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 16:80] = _join_bits(stored.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


class Q3K(Format):
    """256 weights: 32 bytes of high bits, 64 of low bits, 12 of signed 6-bit scales, d."""

    group, low, high, offset = 16, -4, 3, 4
    d_at = 108

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = blocks[..., 96:108]
        low = _nibbles(packed[..., 0:8])
        high = _bits(packed[..., 8:12], 2, 4).flatten(-2)
        scale = (low | (high << 4)).float() - 32
        return scale, scale

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        low = _bits(blocks[..., 32:96].unflatten(-1, (2, 32)), 2, 4).flatten(-3)
        high = _bits(blocks[..., 0:32], 1, 8).flatten(-2)
        return low | (high << 2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 32:96] = _join_bits((stored & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
        blocks[..., 0:32] = _join_bits((stored >> 2).unflatten(-1, (8, 32)), 1)


class Q4K(Format):
    """256 weights: d, dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles."""

    group, low, high = 32, 0, 15
    d_at, dmin_at, dmin_sign = 0, 2, -1

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second, last = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
        scale = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], -1)
        minimum = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], -1)
        return scale.float(), minimum.float()

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles(blocks[..., -128:].unflatten(-1, (4, 32))).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., -128:] = _join_nibbles(stored.unflatten(-1, (4, 64))).flatten(-2)


class Q5K(Q4K):
    """Q4_K's scales, then 32 bytes of fifth bits and 128 bytes of nibbles."""

    high = 31

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        fifth = _bits(blocks[..., 16:48], 1, 8).flatten(-2)
        return super().stored_codes(blocks) | (fifth << 4)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        super().store_codes(blocks, stored & 15)
        blocks[..., 16:48] = _join_bits((stored >> 4).unflatten(-1, (8, 32)), 1)


class Q6K(Format):
    """256 weights: 128 bytes of low nibbles, 64 of high 2-bit fields, 16 signed 8-bit scales, d."""

    group, low, high, offset = 16, -32, 31, 32
    d_at = 208

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = blocks[..., 192:208].contiguous().view(torch.int8).float()
        return scale, scale

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        low = _nibbles(blocks[..., 0:128].unflatten(-1, (2, 64)))  # (..., 2, 128)
        high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2, 4).flatten(-2)
        return (low | (high << 4)).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        halves = stored.unflatten(-1, (2, 128))
        blocks[..., 0:128] = _join_nibbles(halves & 15).flatten(-2)
        blocks[..., 128:192] = _join_bits((halves >> 4).unflatten(-1, (4, 32)), 2).flatten(-2)


class IQ4XS(Format):
    """256 weights: d, 2 + 4 bytes of signed 6-bit scales, 128 bytes of nibbles into IQ4's table."""

    group, low, high, table = 32, 0, 15, IQ4_TABLE

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = _bits(blocks[..., 4:8], 4, 2).transpose(-1, -2).flatten(-2)
        high = _bits(blocks[..., 2:4], 2, 4).transpose(-1, -2).flatten(-2)
        scale = (low | (high << 4)).float() - 32
        return scale, scale

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 8:] = _join_nibbles(stored.unflatten(-1, (8, 32))).flatten(-2)


FORMATS = {
    format.qtype: format
    for format in (
        FourBit("Q4_0", -8),
        FourBit("Q4_1", 0),
        FourBit("IQ4_NL", 0, IQ4_TABLE),
        FiveBit("Q5_0", -16),
        FiveBit("Q5_1", 0),
        EightBit("Q8_0"),
        Q2K("Q2_K"),
        Q3K("Q3_K"),
        Q4K("Q4_K"),
        Q5K("Q5_K"),
        Q6K("Q6_K"),
        IQ4XS("IQ4_XS"),
    )
}
"""The types that GPTQ can decide the codes of."""
