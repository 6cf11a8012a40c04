"""Packed rows of a codebook whose stored numbers follow gradients: what `quantkit.tuning.tunable`
does for scalar grids, for units of eight columns.

Every unit has levels of its own that begin at its entry. The forward pass takes the allowed point
nearest to them, so that the values are exactly what the bytes say; the backward pass goes straight
through that choice (as Bengio et al., arXiv:1308.3432, do for one number), and through the
roundings of d and of the integers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from quantkit.ggml.codebooks import BLOCK, CODEBOOKS, UNIT, Codebook, Codes
from quantkit.ggml.types import QuantType
from quantkit.tuning import kernels_units_cpu
from quantkit.tuning.units import Points, nearest


class TunableUnits:
    """Packed rows whose entries, signs, integers and d are reached by gradients.

    `level`, float32 (n_rows, n_columns), is what the points are chosen for, in units of the mean
    step between neighboring sizes of the table. `scales`, float32 (n_rows, n_blocks), are relative
    changes of d; `integers`, float32 (n_rows, n_groups), are what the stored ones are rounded from.
    Which half of its table a group of IQ1_S uses stays.
    """

    def __init__(self, qtype: QuantType, packed: torch.Tensor) -> None:
        self.book = CODEBOOKS[qtype]
        codes = self.book.codes(packed)
        self.d, self.half = codes.d, _halves(self.book, codes.entry)
        self.unit, self.bound = _steps(self.book)
        self.level = (self.book.levels(codes) / self.unit).contiguous().requires_grad_(True)
        self.scales = torch.zeros_like(codes.d).requires_grad_(True)
        self.integers = codes.integer.float().requires_grad_(True)
        self._multipliers = torch.tensor(self.book.multipliers, device=packed.device)
        self._places = None
        if not packed.is_cuda:
            self._places = kernels_units_cpu.places(self.book, self.level.shape, self.half)

    def weight(self) -> torch.Tensor:
        """Return the weight, float32 (n_rows, n_columns), with gradients."""
        values: torch.Tensor = _Values.apply(self.level, self.scales, self.integers, self)
        return values

    @torch.no_grad()
    def packed(self) -> torch.Tensor:
        """Return the rows as bytes: uint8 (n_rows, row_bytes)."""
        points, _ = self.take()
        return self.book.pack(self._codes(points))

    def take(self) -> tuple[Points, torch.Tensor]:
        """Return the points nearest to the levels as they are now, and the values with them,
        float32 (n_rows, n_columns).
        """
        level, scale = self.level.detach(), self.scale()
        if level.is_cuda:
            return _cuda().values(self.book, level, self.unit, self.half, scale)
        assert self._places is not None
        out = torch.empty_like(level)
        kernels_units_cpu.values(
            self.book, self._places, level.numpy(), self.unit, scale.numpy(), out.numpy()
        )
        entry, signs = (torch.from_numpy(x) for x in self._places[:2])
        return Points(entry, signs), out

    def reference(self) -> tuple[Points, torch.Tensor]:
        """Return the same in plain torch, on any device."""
        level = (self.level.detach() * self.unit).view(-1, UNIT)
        half = self.half.repeat_interleave(self.book.group // UNIT, 1).flatten()
        found = nearest(self.book, level, half)
        n_rows = len(self.d)
        points = Points(found.entry.view(n_rows, -1), found.signs.view(n_rows, -1))
        return points, self.book.decoded(self._codes(points))

    def scale(self) -> torch.Tensor:
        """Return what a group's entries are multiplied with, float32 (n_rows, n_groups)."""
        return self.stored_d().repeat_interleave(BLOCK // self.book.group, 1) * self.multipliers()

    def stored_d(self) -> torch.Tensor:
        """Return d as it would be stored now, float32 (n_rows, n_blocks)."""
        return (self.d * (1 + self.scales.detach())).half().float()

    def multipliers(self) -> torch.Tensor:
        """Return what the integers stand for, float32 (n_rows, n_groups)."""
        return self._multipliers[self._stored_integers().long()]

    def _stored_integers(self) -> torch.Tensor:
        last = len(self.book.multipliers) - 1
        return self.integers.detach().round().clamp(0, last).to(torch.int16)

    def _codes(self, points: Points) -> Codes:
        return Codes(points.entry, points.signs, self._stored_integers(), self.stored_d())


def _halves(book: Codebook, entry: torch.Tensor) -> torch.Tensor:
    """The half of the table that every group uses: int64 (n_rows, n_groups)."""
    first = entry[:, :: book.group // book.width].long()
    return (first >= len(book.entries) // 2).long() if book.halves else torch.zeros_like(first)


def _steps(book: Codebook) -> tuple[float, float]:
    """The mean step between neighboring sizes, and in such steps how far levels may go."""
    if not book.has_signs:
        return 1.0, 1.5  # ternary, moved a little
    sizes = np.unique(book.entries)
    unit = float(sizes[-1] - sizes[0]) / (len(sizes) - 1)
    return unit, float(sizes[-1]) / unit + 0.5


class _Values(torch.autograd.Function):
    """Values of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        level: torch.Tensor,
        scales: torch.Tensor,
        integers: torch.Tensor,
        rows: TunableUnits,
    ) -> torch.Tensor:
        _, values = rows.take()
        ctx.rows, ctx.multipliers, ctx.scale = rows, rows.multipliers(), rows.scale()
        ctx.save_for_backward(level, values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows: TunableUnits = ctx.rows
        level, values = ctx.saved_tensors
        to_level, along = torch.empty_like(level), torch.empty_like(ctx.scale)
        tensors = gradient.contiguous(), level.detach(), values, ctx.scale, to_level, along
        if level.is_cuda:
            _cuda().gradients(rows.unit, rows.bound, *tensors)
        else:
            arrays = (x.numpy() for x in tensors)
            kernels_units_cpu.gradients(rows.unit, rows.bound, *arrays)
        step = rows.book.multipliers[1] - rows.book.multipliers[0]
        per_block = along.unflatten(1, (rows.d.shape[1], -1)).sum(2)
        d = rows.stored_d()
        to_scale = per_block * torch.where(d == 0, 0.0, rows.d / d)
        return to_level, to_scale, along * (step / ctx.multipliers), None


def _cuda() -> ModuleType:
    from quantkit.tuning import kernels_units_cuda  # needs Triton

    return kernels_units_cuda
