"""Packed rows whose stored numbers follow gradients: the forward pass sees exactly what the bytes
would say, the backward pass goes straight through the rounding.
"""

from __future__ import annotations

import torch

from quantkit.gptq.descent import RowState, put_together
from quantkit.kquants.formats import FORMATS, levels_of
from quantkit.qtypes import QuantType


class Tunable:
    """Packed rows whose d and dmin (and codes) are reached by gradients.

    `scales` are relative changes of d, then of dmin; `level` what the codes are rounded from, in
    units of the mean step between codes.
    """

    def __init__(
        self, qtype: QuantType, packed: torch.Tensor, weight: torch.Tensor, with_codes: bool
    ) -> None:
        self.form = FORMATS[qtype]
        self._rows = packed
        n_rows = len(packed)
        blocks = self.form.blocks(packed)
        self._halves = self.form.scales(packed)
        self._scale, self._minimum = (
            x.reshape(n_rows, -1).float().contiguous() for x in self.form.multipliers(blocks)
        )
        self._codes = self.form.codes(packed)
        table = self.form.table
        self._unit = 1.0 if table is None else (table[-1] - table[0]) / (len(table) - 1)
        ends = (self.form.low, self.form.high) if table is None else (table[0], table[-1])
        self._range = ends[0] - self._unit / 2, ends[1] + self._unit / 2
        grid = self.form.grid(packed)
        step = grid.scale.repeat_interleave(grid.group, 1)
        floor = grid.minimum.repeat_interleave(grid.group, 1)
        level = (weight.float() - floor) / torch.where(step == 0, 1.0, step)
        low, high = self._cell()
        margin = 0.02 * (high - low)
        level = torch.minimum(torch.maximum(level, low + margin), high - margin)
        level = torch.where(step == 0, levels_of(self._codes, table), level)
        self.level = (level / self._unit).requires_grad_(with_codes)
        self.scales = torch.zeros_like(self._halves).requires_grad_(True)

    def _cell(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels that round to the codes."""
        if self.form.table is None:
            codes = self._codes.float()
            return codes - 0.5, codes + 0.5
        table = torch.tensor(self.form.table, dtype=torch.float32, device=self._codes.device)
        middle = (table[1:] + table[:-1]) / 2
        bounds = torch.cat([2 * table[:1] - middle[:1], middle, 2 * table[-1:] - middle[-1:]])
        return bounds[self._codes.long()], bounds[self._codes.long() + 1]

    def _rounded(self) -> torch.Tensor:
        """Codes as they are now."""
        if not self.level.requires_grad:
            return self._codes
        return self.form.nearest(self.level.detach() * self._unit)

    def weight(self) -> torch.Tensor:
        """float32 (n_rows, n_columns), with gradients."""
        levels = levels_of(self._rounded(), self.form.table)
        if self.level.requires_grad:
            soft = self.level * self._unit
            inside = soft.clamp(*self._range)  # beyond the last codes nothing pulls
            levels = levels + inside - inside.detach()
        halves = self._halves * (1 + self.scales)
        halves = halves + (halves.half().float() - halves).detach()
        n_rows, n_blocks = len(levels), self.form.blocks(self._rows).shape[1]
        per_block = self._scale.shape[1] // n_blocks

        def widen(per_row: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
            return (per_row[..., None] * integers.view(n_rows, n_blocks, per_block)).view(
                n_rows, -1
            )

        grouped = levels.view(n_rows, -1, self.form.group)
        values = grouped * widen(halves[:, :n_blocks], self._scale)[..., None]
        if self.form.dmin_at is not None:
            minimum = widen(halves[:, n_blocks:], self._minimum)[..., None]
            values = values + self.form.dmin_sign * minimum
        return values.view(n_rows, -1)

    @torch.no_grad()
    def packed(self) -> torch.Tensor:
        """The rows as bytes."""
        halves = (self._halves * (1 + self.scales)).half().float()
        n_blocks = self.form.blocks(self._rows).shape[1]
        state = RowState(
            self.form,
            self._rounded().to(torch.int8),
            halves[:, :n_blocks],
            halves[:, n_blocks:],
            self._scale,
            self._minimum,
            self._halves,
        )
        return put_together(state, self._rows)
