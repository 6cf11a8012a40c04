"""Packed rows whose stored numbers follow gradients: the forward pass sees exactly what the bytes
say, the backward pass goes straight through the roundings.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from quantkit.ggml.formats import FORMATS, Format, levels_of
from quantkit.ggml.types import QuantType
from quantkit.gptq.descent import RowState, put_together

_MARGIN = 0.02  # of a code's cell: how near to its edge a level may begin


class Tunable:
    """Packed rows whose codes, d and dmin are reached by gradients.

    `scales`, float32 (n_rows, n_blocks or 2 n_blocks), are relative changes of d, then of dmin;
    `level`, float32 (n_rows, n_columns), is what the codes are rounded from, in units of the mean
    step between codes: the original `weight` on the rows' grid, moved into the cell of the code
    that is stored. The integer scales and minimums of K-quants stay.
    """

    def __init__(self, qtype: QuantType, packed: torch.Tensor, weight: torch.Tensor) -> None:
        self.form = FORMATS[qtype]
        self._rows = packed
        n_rows = len(packed)
        blocks = self.form.blocks(packed)
        self.halves = self.form.scales(packed)
        self.scale, self.minimum = (
            x.reshape(n_rows, -1).float().contiguous() for x in self.form.multipliers(blocks)
        )
        codes = self.form.codes(packed)
        table = self.form.table
        self.unit = 1.0 if table is None else (table[-1] - table[0]) / (len(table) - 1)
        bounds = _cells(self.form).to(packed.device)
        self.range = float(bounds[0]) / self.unit, float(bounds[-1]) / self.unit
        grid = self.form.grid(packed)
        step = grid.scale.repeat_interleave(grid.group, 1)
        floor = grid.minimum.repeat_interleave(grid.group, 1)
        level = (weight.float() - floor) / torch.where(step == 0, 1.0, step)
        cell = codes.long() - (self.form.low if table is None else 0)
        low, high = bounds[cell], bounds[cell + 1]
        margin = _MARGIN * (high - low)
        level = torch.minimum(torch.maximum(level, low + margin), high - margin)
        level = torch.where(step == 0, levels_of(codes, table), level)
        self.level = (level / self.unit).requires_grad_(True)
        self.scales = torch.zeros_like(self.halves).requires_grad_(True)

    def codes(self) -> torch.Tensor:
        """Return the codes as they are now, int8 (n_rows, n_columns)."""
        return self.form.nearest(self.level.detach() * self.unit).to(torch.int8)

    def stored_halves(self) -> torch.Tensor:
        """Return d and dmin as they would be stored now, float32 (n_rows, n_blocks or 2
        n_blocks).
        """
        return self.form.storable(self.halves * (1 + self.scales.detach()))

    def weight(self) -> torch.Tensor:
        """Return the weight, float32 (n_rows, n_columns), with gradients."""
        values: torch.Tensor = _Values.apply(self.level, self.scales, self)
        return values

    @torch.no_grad()
    def packed(self) -> torch.Tensor:
        """Return the rows as bytes: uint8 (n_rows, row_bytes)."""
        d, dmin = self._split(self.stored_halves())
        state = RowState(
            self.form, self.codes(), d, dmin, self.scale, self.minimum, self.level.detach()
        )
        return put_together(state, self._rows)

    def _split(self, halves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of d and those of dmin, the second without columns where there is none."""
        n_blocks = self.form.blocks(self._rows).shape[1]
        return halves[:, :n_blocks], halves[:, n_blocks:]

    def grid(self, halves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scale and minimum of every group (n_rows, n_groups), for d and dmin."""
        d, dmin = self._split(halves)
        scale = self._per_group(d) * self.scale
        if self.form.dmin_at is None:
            return scale, None
        return scale, self.form.dmin_sign * self._per_group(dmin) * self.minimum

    def _per_group(self, per_block: torch.Tensor) -> torch.Tensor:
        return per_block.repeat_interleave(self.scale.shape[1] // per_block.shape[1], 1)

    def per_block(self, per_group: torch.Tensor) -> torch.Tensor:
        """Return the sums over the groups of every block."""
        n_blocks = self.form.blocks(self._rows).shape[1]
        return per_group.view(len(per_group), n_blocks, -1).sum(2)


def _cells(form: Format) -> torch.Tensor:
    """float32 (n_codes + 1,): between which levels each code is the nearest; the first and the last
    cell end where their neighbors' width says.
    """
    if form.table is None:
        return torch.arange(form.low, form.high + 2) - 0.5
    table = torch.tensor(form.table, dtype=torch.float32)
    middle = (table[1:] + table[:-1]) / 2
    return torch.cat([2 * table[:1] - middle[:1], middle, 2 * table[-1:] - middle[-1:]])


class _Values(torch.autograd.Function):
    """Values of the rows."""

    @staticmethod
    def forward(ctx: Any, level: torch.Tensor, scales: torch.Tensor, rows: Tunable) -> torch.Tensor:
        halves = rows.stored_halves()
        ctx.rows = rows
        scale, minimum = rows.grid(halves)
        if level.is_cuda:
            ctx.save_for_backward(level, halves)
            return _cuda().values(rows.form, level, rows.unit, scale, minimum)
        codes = rows.codes()
        ctx.save_for_backward(level, halves, codes)
        values = levels_of(codes, rows.form.table).view(len(codes), -1, rows.form.group)
        values = values * scale[..., None]
        if minimum is not None:
            values += minimum[..., None]
        return values.view(codes.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows: Tunable = ctx.rows
        level, halves, *codes = ctx.saved_tensors
        scale, minimum = rows.grid(halves)
        if level.is_cuda:
            has_minimum = minimum is not None
            to_level, by_level, plain = _cuda().gradients(
                rows.form, gradient, level, rows.unit, rows.range, scale, has_minimum
            )
        else:
            grouped = gradient.reshape(len(level), -1, rows.form.group)
            # beyond the last codes nothing pulls
            inside = (level > rows.range[0]) & (level < rows.range[1])
            to_level = (grouped * (scale * rows.unit)[..., None]).view(level.shape) * inside
            levels = levels_of(codes[0], rows.form.table).view_as(grouped)
            by_level = (grouped * levels).sum(2)
            plain = by_level if minimum is None else grouped.sum(2)
        parts = [rows.per_block(by_level * rows.scale)]
        if minimum is not None:
            parts.append(rows.per_block(plain * rows.minimum) * rows.form.dmin_sign)
        return to_level, torch.cat(parts, 1) * rows.halves, None


def _cuda() -> ModuleType:
    from quantkit.tuning import kernels_cuda  # needs Triton

    return kernels_cuda
