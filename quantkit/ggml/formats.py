"""Read and write block formats whose values lie on a grid: their scales and codes in the bytes.

In all of them the value of a weight is `scale * level(code) + minimum`, with scale and minimum
shared by a group of 16 to 64 columns. `level(code)` is the code itself, or an entry of a table of
16 (IQ4, MXFP4). GPTQ keeps the scales that ggml chose and decides the codes; so a format reads grid
and codes out of packed rows and puts other codes in.

The layouts are those of ggml-common.h and of `dequantize_row_*` in ggml-quants.c. Tensors are
torch, on any device: packed rows are uint8 (n_rows, n_blocks, block_bytes), codes int16 (n_rows,
n_columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.ggml import e8m0
from quantkit.ggml.fields import bits, half, join_bits, join_nibbles, nibbles
from quantkit.ggml.types import QuantType

# kvalues_iq4nl of ggml-common.h
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# kvalues_mxfp4 in rising order: there are two zeros, of which code 7 is the negative one
FP4_TABLE = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)


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
        """Return the float32 values of integer codes (n_rows, n_columns)."""
        levels = levels_of(codes, self.table)
        n_rows = codes.shape[0]
        grouped = levels.view(n_rows, -1, self.group)
        return (grouped * self.scale[..., None] + self.minimum[..., None]).view(n_rows, -1)


def levels_of(codes: torch.Tensor, table: tuple[int, ...] | None) -> torch.Tensor:
    """Return what codes are multiplied with, float32: themselves, or their entry in the table."""
    if table is None:
        return codes.float()
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]


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
    scale_is_power = False  # d is a power of two, and not a float16
    scale_range: tuple[int, int] | None = None  # of the integers that d is multiplied with
    minimum_range: tuple[int, int] | None = None  # of those that dmin is multiplied with

    def __init__(self, name: str) -> None:
        self.qtype = QuantType(name)

    def blocks(self, packed: torch.Tensor) -> torch.Tensor:
        """View uint8 (n_rows, row_bytes) as (n_rows, n_blocks, block_bytes)."""
        return packed.view(packed.shape[0], -1, self.qtype.block_bytes)

    def grid(self, packed: torch.Tensor) -> Grid:
        """Return the scale and minimum of every group of packed rows (n_rows, row_bytes)."""
        blocks = self.blocks(packed)
        n_rows = packed.shape[0]
        scale_codes, minimum_codes = self.multipliers(blocks)
        scale = (self.d_of(blocks) * scale_codes).reshape(n_rows, -1)
        minimum = torch.zeros_like(scale)
        if self.dmin_at is not None:
            minimum = (self.dmin_sign * half(blocks, self.dmin_at) * minimum_codes).reshape(
                n_rows, -1
            )
        return Grid(scale, minimum, self.group, self.low, self.high, self.table)

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the int16 codes (n_rows, n_columns) of packed rows."""
        stored = self.stored_codes(self.blocks(packed)).to(torch.int16)
        return stored.reshape(packed.shape[0], -1) - self.offset

    def values(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the float32 values (n_rows, n_columns) of packed rows."""
        return self.grid(packed).values(self.codes(packed))

    def with_codes(self, packed: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return a copy of packed rows whose weights have other codes; scales stay."""
        blocks = self.blocks(packed).clone()
        stored = (
            (codes + self.offset).to(torch.uint8).view(*blocks.shape[:2], self.qtype.block_size)
        )
        self.store_codes(blocks, stored)
        return blocks.view(packed.shape)

    def nearest(self, level: torch.Tensor) -> torch.Tensor:
        """Return the codes whose levels are nearest to float32 `level`, of any shape."""
        if self.table is None:
            return level.round().clamp(self.low, self.high)
        table = torch.tensor(self.table, dtype=torch.float32, device=level.device)
        return torch.bucketize(level, (table[1:] + table[:-1]) / 2)

    def d_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return d of every block, float32 (n_rows, n_blocks, 1)."""
        return half(blocks, self.d_at)

    def scales(self, packed: torch.Tensor) -> torch.Tensor:
        """Return d of every block, then dmin of every block: float32 (n_rows, n_blocks or 2
        n_blocks).
        """
        blocks = self.blocks(packed)
        found = [self.d_of(blocks)]
        if self.dmin_at is not None:
            found.append(half(blocks, self.dmin_at))
        return torch.cat(found, 1)[..., 0]

    def storable(self, scales: torch.Tensor) -> torch.Tensor:
        """Return what a block stores of float32 `scales`, d or dmin."""
        return scales.half().float()

    def with_scales(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return a copy of packed rows with other `scales`, rounded to what is `storable`."""
        blocks = self.blocks(packed).clone()
        parts = scales.half().chunk(len(self._half_at), 1)
        for at, values in zip(self._half_at, parts, strict=True):
            blocks[..., at : at + 2] = values.contiguous()[..., None].view(torch.uint8)
        return blocks.view(packed.shape)

    @property
    def _half_at(self) -> tuple[int, ...]:
        return (self.d_at,) if self.dmin_at is None else (self.d_at, self.dmin_at)

    def with_multipliers(
        self, packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> torch.Tensor:
        """Return a copy of packed rows with other integer scales and minimums, (n_rows, n_groups)
        each.
        """
        blocks = self.blocks(packed).clone()
        shape = (*blocks.shape[:2], -1)
        integers = (x.to(torch.int16).view(shape) for x in (scale, minimum))
        self.store_multipliers(blocks, *integers)
        return blocks.view(packed.shape)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the integer scale and minimum codes per group, float32 (n_rows, n_blocks, groups
        per block).
        """
        one = torch.ones((), device=blocks.device).expand(*blocks.shape[:2], 1)
        return one, one

    def store_multipliers(
        self, blocks: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> None:
        """Write integer scales and minimums, int16 (n_rows, n_blocks, groups), into `blocks`."""
        raise NotImplementedError

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the unsigned codes as stored, uint8 (n_rows, n_blocks, block_size)."""
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
        return nibbles(blocks[..., -16:])

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., -16:] = join_nibbles(stored)


class FiveBit(Format):
    """32 weights: d, (m,) 4 bytes of fifth bits, 16 bytes of nibbles. Q5_0, Q5_1."""

    group = 32

    def __init__(self, name: str, low: int) -> None:
        super().__init__(name)
        self.low, self.high, self.offset = low, low + 31, -low
        self.dmin_at = 2 if name == "Q5_1" else None

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        fifth = (
            bits(blocks[..., -20:-16], 1, 8).transpose(-1, -2).flatten(-2)
        )  # bit j belongs to weight j
        return nibbles(blocks[..., -16:]) | (fifth << 4)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., -16:] = join_nibbles(stored & 15)
        blocks[..., -20:-16] = join_bits((stored >> 4).unflatten(-1, (4, 8)).transpose(-1, -2), 1)


class TwoBit(Format):
    """64 weights: d, which may be negative, 16 bytes of 2-bit codes, four neighbors in each.
    Q2_0.
    """

    group, low, high, offset = 64, -1, 2, 1

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return bits(blocks[..., 2:], 2, 4).transpose(-1, -2).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 2:] = join_bits(stored.unflatten(-1, (16, 4)).transpose(-1, -2), 2)


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
    scale_range = minimum_range = (0, 15)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = blocks[..., 0:16]
        return (packed & 15).float(), (packed >> 4).float()

    def store_multipliers(
        self, blocks: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> None:
        blocks[..., 0:16] = (scale | (minimum << 4)).to(torch.uint8)

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return bits(blocks[..., 16:80].unflatten(-1, (2, 32)), 2, 4).flatten(-3)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 16:80] = join_bits(stored.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


class Q3K(Format):
    """256 weights: 32 bytes of high bits, 64 of low bits, 12 of signed 6-bit scales, d."""

    group, low, high, offset = 16, -4, 3, 4
    d_at = 108
    scale_range = (-32, 31)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = blocks[..., 96:108]
        low = nibbles(packed[..., 0:8])
        high = bits(packed[..., 8:12], 2, 4).flatten(-2)
        scale = (low | (high << 4)).float() - 32
        return scale, scale

    def store_multipliers(
        self, blocks: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> None:
        stored = (scale + 32).to(torch.uint8)
        blocks[..., 96:104] = join_nibbles(stored & 15)
        blocks[..., 104:108] = join_bits((stored >> 4).unflatten(-1, (4, 4)), 2)

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        low = bits(blocks[..., 32:96].unflatten(-1, (2, 32)), 2, 4).flatten(-3)
        high = bits(blocks[..., 0:32], 1, 8).flatten(-2)
        return low | (high << 2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 32:96] = join_bits((stored & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
        blocks[..., 0:32] = join_bits((stored >> 2).unflatten(-1, (8, 32)), 1)


class Q4K(Format):
    """256 weights: d, dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles."""

    group, low, high = 32, 0, 15
    d_at, dmin_at, dmin_sign = 0, 2, -1
    scale_range = minimum_range = (0, 63)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second, last = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
        scale = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], -1)
        minimum = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], -1)
        return scale.float(), minimum.float()

    def store_multipliers(
        self, blocks: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> None:
        s, m = scale.to(torch.uint8), minimum.to(torch.uint8)
        blocks[..., 4:8] = s[..., :4] | ((s[..., 4:] >> 4) << 6)
        blocks[..., 8:12] = m[..., :4] | ((m[..., 4:] >> 4) << 6)
        blocks[..., 12:16] = (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return nibbles(blocks[..., -128:].unflatten(-1, (4, 32))).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., -128:] = join_nibbles(stored.unflatten(-1, (4, 64))).flatten(-2)


class Q5K(Q4K):
    """Q4_K's scales, then 32 bytes of fifth bits and 128 bytes of nibbles."""

    high = 31

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        fifth = bits(blocks[..., 16:48], 1, 8).flatten(-2)
        return super().stored_codes(blocks) | (fifth << 4)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        super().store_codes(blocks, stored & 15)
        blocks[..., 16:48] = join_bits((stored >> 4).unflatten(-1, (8, 32)), 1)


class Q6K(Format):
    """256 weights: 128 bytes of low nibbles, 64 of high 2-bit fields, 16 signed 8-bit scales, d."""

    group, low, high, offset = 16, -32, 31, 32
    d_at = 208
    scale_range = (-128, 127)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = blocks[..., 192:208].contiguous().view(torch.int8).float()
        return scale, scale

    def store_multipliers(
        self, blocks: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> None:
        blocks[..., 192:208] = scale.to(torch.int8).view(torch.uint8)

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        low = nibbles(blocks[..., 0:128].unflatten(-1, (2, 64)))  # (..., 2, 128)
        high = bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2, 4).flatten(-2)
        return (low | (high << 4)).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        halves = stored.unflatten(-1, (2, 128))
        blocks[..., 0:128] = join_nibbles(halves & 15).flatten(-2)
        blocks[..., 128:192] = join_bits((halves >> 4).unflatten(-1, (4, 32)), 2).flatten(-2)


class IQ4XS(Format):
    """256 weights: d, 2 + 4 bytes of signed 6-bit scales, 128 bytes of nibbles into IQ4's table."""

    group, low, high, table = 32, 0, 15, IQ4_TABLE
    scale_range = (-32, 31)

    def multipliers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = bits(blocks[..., 4:8], 4, 2).transpose(-1, -2).flatten(-2)
        high = bits(blocks[..., 2:4], 2, 4).transpose(-1, -2).flatten(-2)
        scale = (low | (high << 4)).float() - 32
        return scale, scale

    def store_multipliers(
        self, blocks: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
    ) -> None:
        stored = (scale + 32).to(torch.uint8)
        low, high = (stored & 15).unflatten(-1, (4, 2)), (stored >> 4).unflatten(-1, (2, 4))
        blocks[..., 4:8] = join_bits(low.transpose(-1, -2), 4)
        blocks[..., 2:4] = join_bits(high.transpose(-1, -2), 2)

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        return nibbles(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        blocks[..., 8:] = join_nibbles(stored.unflatten(-1, (8, 32))).flatten(-2)


class MXFP4(FourBit):
    """32 weights: a byte that is a power of two, 16 bytes of nibbles into E2M1's table."""

    scale_is_power = True

    def __init__(self) -> None:
        super().__init__("MXFP4", 0, FP4_TABLE)

    def d_of(self, blocks: torch.Tensor) -> torch.Tensor:
        return e8m0.decode(blocks[..., :1])

    def storable(self, scales: torch.Tensor) -> torch.Tensor:
        return e8m0.nearest(scales)

    def with_scales(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        blocks = self.blocks(packed).clone()
        blocks[..., 0] = e8m0.encode(scales)
        return blocks.view(packed.shape)

    def stored_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        stored = super().stored_codes(blocks)
        return torch.where(stored < 8, stored + 8, 15 - stored)

    def store_codes(self, blocks: torch.Tensor, stored: torch.Tensor) -> None:
        super().store_codes(blocks, torch.where(stored < 8, 15 - stored, stored - 8))


FORMATS = {
    format.qtype: format
    for format in (
        FourBit("Q4_0", -8),
        FourBit("Q4_1", 0),
        FourBit("IQ4_NL", 0, IQ4_TABLE),
        FiveBit("Q5_0", -16),
        FiveBit("Q5_1", 0),
        EightBit("Q8_0"),
        TwoBit("Q2_0"),
        MXFP4(),
        Q2K("Q2_K"),
        Q3K("Q3_K"),
        Q4K("Q4_K"),
        Q5K("Q5_K"),
        Q6K("Q6_K"),
        IQ4XS("IQ4_XS"),
    )
}
"""The types whose codes lie on a grid: GPTQ and tuning decide them one by one."""
