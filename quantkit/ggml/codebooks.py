"""Read and write block formats whose weights are entries of a codebook: ggml's IQ1, IQ2 and IQ3.

Eight neighboring columns are a *unit*: one entry of a table of eight values, or two entries of a
table of four. An entry holds sizes, and the unit has a sign for each column; where signs are *even*
seven are stored and the eighth makes the number of negative ones even. IQ1's entries are ternary
values moved by 1/8 up or down: both are entries here, the second half of the table moved down. The
value of a weight is `d * multiplier * sign * entry`, with an integer that names the multiplier for
every group of 16 or 32 columns and a float16 d for 256.

The layouts are those of ggml-common.h and of `dequantize_row_iq*` in ggml-quants.c, the tables are
gguf-py's. Tensors are torch, on any device: packed rows are uint8 (n_rows, row_bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.ggml.types import QuantType

UNIT = 8  # columns that have one byte of signs
BLOCK = 256  # columns that share a d

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Field:
    """The places of some numbers in the bits of a block. Number k is made of pieces, its low bits
    first: each has so many bits, at most nine, from bit `at[k]` of the block on. A bit that several
    numbers share is written by the first of them.
    """

    pieces: tuple[tuple[Places, int], ...]

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the numbers of blocks uint8 (..., block_bytes) as int32 (..., n)."""
        found = torch.zeros((), dtype=torch.int32, device=blocks.device)
        done = 0
        for at, n_bits in self.pieces:
            low = torch.from_numpy(at // 8).to(blocks.device)
            high = low.add(1).clamp_max(blocks.shape[-1] - 1)
            words = blocks[..., low].int() | (blocks[..., high].int() << 8)
            shifts = torch.from_numpy(at % 8).to(blocks.device, torch.int32)
            found = found | (((words >> shifts) & ((1 << n_bits) - 1)) << done)
            done += n_bits
        return found

    def write(self, sums: torch.Tensor, numbers: torch.Tensor) -> None:
        """Add int32 numbers (..., n) to the bytes `sums`, int32 (..., block_bytes + 1), whose bits
        here are still zero.
        """
        done = 0
        for at, n_bits in self.pieces:
            places, first = np.unique(at, return_index=True)
            own = numbers[..., torch.from_numpy(first).to(numbers.device)]
            shifts = torch.from_numpy(places % 8).to(numbers.device, torch.int32)
            words = ((own >> done) & ((1 << n_bits) - 1)) << shifts
            low = torch.from_numpy(places // 8).to(numbers.device)
            sums.index_add_(-1, low, words & 255)
            sums.index_add_(-1, low + 1, words >> 8)
            done += n_bits


@dataclass(frozen=True)
class Codes:
    """Packed rows taken apart: every number that they store.

    `entry` int16 (n_rows, n_columns / width), `signs` uint8 (n_rows, n_columns / 8), of which bit i
    is set where column i is negative, `integer` int16 (n_rows, n_columns / group), `d` float32
    (n_rows, n_columns / 256).
    """

    entry: torch.Tensor
    signs: torch.Tensor
    integer: torch.Tensor
    d: torch.Tensor


@dataclass(frozen=True)
class Codebook:
    """One block format of 256 weights whose units are entries of a table."""

    qtype: QuantType
    table: str  # the type of gguf-py that has the entries
    width: int  # columns of an entry: 8 or 4
    signs_stored: int  # of a unit: 8; 7 where an even number is negative; 0: in the entries
    group: int  # columns that share a multiplier
    multipliers: tuple[float, ...]
    entries_at: Field
    signs_at: Field | None
    integers_at: Field
    d_at: Field
    halves: bool = False  # whether all entries of a group lie in one half of the table

    @cached_property
    def entries(self) -> NDArray[np.float32]:
        """The table, float32 (n_entries, width)."""
        known = getattr(gguf.quants, self.table)
        known.init_grid()
        grid = known.grid.reshape(-1, self.width).astype(np.float32)
        if self.has_signs:
            return np.ascontiguousarray(grid)
        shift = np.float32(0.125)  # IQ1S_DELTA
        return np.concatenate([grid + shift, grid - shift])

    @property
    def has_signs(self) -> bool:
        """Return whether signs are stored beside the entries."""
        return self.signs_stored > 0

    @property
    def signs_are_even(self) -> bool:
        """Return whether a unit has an even number of negative columns."""
        return self.signs_stored == 7

    @property
    def sign_kind(self) -> int:
        """Return what kernels are told of signs: 0 where they are in the entries, 1 where they are
        free, 2 where an even number of a unit's columns is negative.
        """
        return (2 if self.signs_are_even else 1) if self.has_signs else 0

    def blocks(self, packed: torch.Tensor) -> torch.Tensor:
        """View uint8 (n_rows, row_bytes) as (n_rows, n_blocks, block_bytes)."""
        return packed.view(packed.shape[0], -1, self.qtype.block_bytes)

    def codes(self, packed: torch.Tensor) -> Codes:
        """Take packed rows (n_rows, row_bytes) apart."""
        blocks = self.blocks(packed)
        n_rows, n_units = len(packed), blocks.shape[1] * BLOCK // UNIT
        signs = torch.zeros((n_rows, n_units), dtype=torch.uint8, device=packed.device)
        if self.signs_at is not None:
            signs = self.signs_at.read(blocks).to(torch.uint8).reshape(n_rows, -1)
            signs = _with_eighth(signs) if self.signs_are_even else signs
        return Codes(
            self.entries_at.read(blocks).to(torch.int16).reshape(n_rows, -1),
            signs,
            self.integers_at.read(blocks).to(torch.int16).reshape(n_rows, -1),
            self.d_at.read(blocks).to(torch.int16).view(torch.float16).float().view(n_rows, -1),
        )

    def pack(self, codes: Codes) -> torch.Tensor:
        """Return rows uint8 (n_rows, row_bytes) that store `codes`; d is rounded to float16. Of
        even signs the eighth is not looked at.
        """
        n_rows, n_blocks = codes.d.shape
        shape = (n_rows, n_blocks, self.qtype.block_bytes + 1)
        sums = torch.zeros(shape, dtype=torch.int32, device=codes.d.device)
        halves = codes.d.half().view(torch.int16).int() & 0xFFFF
        numbers = [(self.entries_at, codes.entry), (self.integers_at, codes.integer)]
        numbers += [(self.d_at, halves)]
        if self.signs_at is not None:
            numbers.append((self.signs_at, codes.signs))
        for field, values in numbers:
            field.write(sums, values.int().reshape(n_rows, n_blocks, -1))
        return sums[..., :-1].to(torch.uint8).reshape(n_rows, -1)

    def scale(self, codes: Codes) -> torch.Tensor:
        """Return what the entries of every group are multiplied with, float32 (n_rows,
        n_groups).
        """
        multipliers = torch.tensor(self.multipliers, device=codes.d.device)[codes.integer.long()]
        return multipliers * codes.d.repeat_interleave(BLOCK // self.group, 1)

    def levels(self, codes: Codes) -> torch.Tensor:
        """Return entries with their signs, float32 (n_rows, n_columns)."""
        table = torch.from_numpy(self.entries).to(codes.d.device)
        sizes = table[codes.entry.long()].view(len(codes.d), -1)
        if self.signs_at is None:
            return sizes
        bits = torch.arange(UNIT, dtype=torch.uint8, device=codes.d.device)
        negative = ((codes.signs[..., None] >> bits) & 1).bool().view(sizes.shape)
        return torch.where(negative, -sizes, sizes)

    def decoded(self, codes: Codes) -> torch.Tensor:
        """Return the float32 values (n_rows, n_columns) of rows that were taken apart."""
        levels = self.levels(codes).unflatten(1, (-1, self.group))
        return (levels * self.scale(codes)[..., None]).flatten(1)

    def values(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the float32 values (n_rows, n_columns) of packed rows."""
        return self.decoded(self.codes(packed))


def _with_eighth(signs: torch.Tensor) -> torch.Tensor:
    """Seven signs and the one that makes them even, uint8."""
    folded = signs ^ (signs >> 4)
    folded = folded ^ (folded >> 2)
    return signs | (((folded ^ (folded >> 1)) & 1) << 7)


def _field(*pieces: tuple[Places, int]) -> Field:
    return Field(pieces)


_PER_32 = np.arange(8)
_PER_16 = np.arange(16)
_UNITS = np.arange(32)
_FOURS = np.arange(64)
_OF_32, _IN_32 = _UNITS // 4, _UNITS % 4  # a unit's 32 columns, and its place in them
_D = _field((np.array([0]), 8), (np.array([8]), 8))


def _multipliers(n: int, first: float, step: float) -> tuple[float, ...]:
    return tuple(first + step * i for i in range(n))


_FOUR_BITS_OVER_4 = _multipliers(16, 0.125, 0.25)  # (0.5 + integer) / 4
_THREE_BITS = _multipliers(8, 1.0, 2.0)

_ALL: Sequence[Codebook] = (
    Codebook(
        QuantType("IQ2_XXS"),
        table="IQ2_XXS",
        width=8,
        signs_stored=7,
        group=32,
        multipliers=_FOUR_BITS_OVER_4,
        entries_at=_field((16 + 64 * _OF_32 + 8 * _IN_32, 8)),
        signs_at=_field((48 + 64 * _OF_32 + 7 * _IN_32, 7)),
        integers_at=_field((76 + 64 * _PER_32, 4)),
        d_at=_D,
    ),
    Codebook(
        QuantType("IQ2_XS"),
        table="IQ2_XS",
        width=8,
        signs_stored=7,
        group=16,
        multipliers=_FOUR_BITS_OVER_4,
        entries_at=_field((16 + 16 * _UNITS, 9)),
        signs_at=_field((25 + 16 * _UNITS, 7)),
        integers_at=_field((528 + 4 * _PER_16, 4)),
        d_at=_D,
    ),
    Codebook(
        QuantType("IQ2_S"),
        table="IQ2_S",
        width=8,
        signs_stored=8,
        group=16,
        multipliers=_FOUR_BITS_OVER_4,
        entries_at=_field((16 + 8 * _UNITS, 8), (528 + 2 * _UNITS, 2)),
        signs_at=_field((272 + 8 * _UNITS, 8)),
        integers_at=_field((592 + 4 * _PER_16, 4)),
        d_at=_D,
    ),
    Codebook(
        QuantType("IQ3_XXS"),
        table="IQ3_XXS",
        width=4,
        signs_stored=7,
        group=32,
        multipliers=_multipliers(16, 0.25, 0.5),  # (0.5 + integer) / 2
        entries_at=_field((16 + 8 * _FOURS, 8)),
        signs_at=_field((528 + 32 * _OF_32 + 7 * _IN_32, 7)),
        integers_at=_field((556 + 32 * _PER_32, 4)),
        d_at=_D,
    ),
    Codebook(
        QuantType("IQ3_S"),
        table="IQ3_S",
        width=4,
        signs_stored=8,
        group=32,
        multipliers=_multipliers(16, 1.0, 2.0),
        entries_at=_field((16 + 8 * _FOURS, 8), (528 + _FOURS, 1)),
        signs_at=_field((592 + 8 * _UNITS, 8)),
        integers_at=_field((848 + 4 * _PER_32, 4)),
        d_at=_D,
    ),
    Codebook(
        QuantType("IQ1_S"),
        table="IQ1_S",
        width=8,
        signs_stored=0,
        group=32,
        multipliers=_THREE_BITS,
        entries_at=_field(
            (16 + 8 * _UNITS, 8), (272 + 16 * _OF_32 + 3 * _IN_32, 3), (287 + 16 * _OF_32, 1)
        ),
        signs_at=None,
        integers_at=_field((284 + 16 * _PER_32, 3)),
        d_at=_D,
        halves=True,
    ),
    Codebook(
        QuantType("IQ1_M"),
        table="IQ1_S",
        width=8,
        signs_stored=0,
        group=16,
        multipliers=_THREE_BITS,
        entries_at=_field((8 * _UNITS, 8), (256 + 4 * _UNITS, 4)),
        signs_at=None,
        integers_at=_field((384 + 16 * (_PER_16 // 4) + 3 * (_PER_16 % 4), 3)),
        # four bits at the top of each of four 16-bit words
        d_at=_field(*((np.array([396 + 16 * word]), 4) for word in range(4))),
    ),
)

CODEBOOKS = {book.qtype: book for book in _ALL}
"""The types whose entries, signs and integers GPTQ can decide."""
