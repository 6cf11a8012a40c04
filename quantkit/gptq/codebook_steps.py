"""What GPTQ and the descent do to eight columns, or a block of 256, of codebook types: the rows on
their way, and the walk and the step in torch, on any device. They are the references of the
compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch

from quantkit.ggml.codebooks import BLOCK, UNIT, Codebook, Codes
from quantkit.gptq.codebook_tables import norms_of
from quantkit.gptq.codebook_units import choose, sign_bytes

LEAST_STEP = 0.25  # of an integer: a scale that is nearer to the best one is not changed


@dataclass(frozen=True)
class UnitStack:
    """Rows on the way through block feedback, transposed, columns in the factor's order."""

    book: Codebook
    weight: torch.Tensor  # float32 (n_columns, n_rows); becomes scaled errors
    metrics: torch.Tensor  # float32 (n_units, 8, 8), units in the factor's order
    group_of: torch.Tensor  # int64 (n_units,), too
    scale: torch.Tensor  # float32 (n_groups, n_rows), in their own order
    half: torch.Tensor  # uint8 (n_groups, n_rows): the half of the table that a group uses
    entry: torch.Tensor  # int16 (n_columns / width, n_rows), filled by the sweep
    signs: torch.Tensor  # uint8 (n_units, n_rows), filled by the sweep


Walk = Callable[[UnitStack, torch.Tensor, int, int], None]


def halves_of(book: Codebook, entry: torch.Tensor) -> torch.Tensor:
    """Return the half of the table that every group uses: int64 (n_rows, n_groups)."""
    first = entry[:, :: book.group // book.width]
    return (first >= len(book.entries) // 2).long() if book.halves else torch.zeros_like(first)


def walk_units(stack: UnitStack, upper: torch.Tensor, start: int, end: int) -> None:
    """Decide the units of columns start..end one by one; their scaled errors replace them in
    `stack.weight`. The reference.
    """
    per_unit = UNIT // stack.book.width
    for unit in range(start // UNIT, end // UNIT):
        own, group = slice(UNIT * unit, UNIT * (unit + 1)), stack.group_of[unit]
        scale = stack.scale[group]
        target = stack.weight[own] / torch.where(scale == 0, 1.0, scale)
        half = stack.half[group].long()
        chosen = choose(stack.book, target.T, stack.metrics[unit], half)
        lowest = half * (len(stack.book.entries) // 2)
        entry = torch.where(scale == 0, lowest, chosen.entry.T)
        stack.entry[per_unit * unit : per_unit * (unit + 1)] = entry.to(torch.int16)
        if stack.book.has_signs:
            stack.signs[unit] = torch.where(scale == 0, 0, sign_bytes(chosen.levels))
        error = stack.weight[own] - chosen.levels.T * scale
        scaled = torch.linalg.solve_triangular(upper[own, own].mT, error, upper=False)
        stack.weight[own] = scaled
        stack.weight[own.stop : end].addmm_(upper[own, own.stop : end].mT, scaled, alpha=-1)


@dataclass(frozen=True)
class UnitBlock:
    """A block of 256 columns of all rows; steps change the tensors in place.

    `entry` int16 (n_rows, 256 / width), `signs` uint8 (n_rows, 32), `integer` int16 (n_rows,
    n_groups), `d` float32 (n_rows,), `gradient` E H float32 (n_rows, 256); `hessian` (256, 256) is
    the block's own, `inverses` (32, 8, 8) those of its units; `is_diagonal` says that it is, which
    saves a GPU's step work. For that step experts, or blocks that do not depend on each other, may
    be an axis in front of all.
    """

    book: Codebook
    entry: torch.Tensor
    signs: torch.Tensor
    integer: torch.Tensor
    d: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor
    inverses: torch.Tensor
    is_diagonal: bool = field(default=False, kw_only=True)

    @cached_property
    def metrics(self) -> torch.Tensor:
        """The own parts of its units of the Hessian, float32 (32, 8, 8)."""
        return own_parts(self.hessian)

    @cached_property
    def norms(self) -> torch.Tensor:
        """The norms of entries by its metrics, as `norms_of` returns them."""
        return norms_of(self.book, self.metrics)


Step = Callable[[UnitBlock], torch.Tensor]
"""Descends on one block; returns what that added to the values, float32 (n_rows, 256)."""


def own_parts(square: torch.Tensor) -> torch.Tensor:
    """Return each unit's own part of float32 (..., n, n): (..., n / 8, 8, 8)."""
    parts = square.unflatten(-1, (-1, UNIT)).unflatten(-3, (-1, UNIT))
    return parts.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@dataclass(frozen=True)
class _Group:
    """One group of all rows: float32 (n_rows, group) each; entry int64 (n_rows, group / width)."""

    values: torch.Tensor
    levels: torch.Tensor
    slope: torch.Tensor
    entry: torch.Tensor

    def where(self, good: torch.Tensor, other: _Group) -> _Group:
        """Return the rows of `other` where it is good, bool (n_rows,)."""
        return _Group(
            *(torch.where(good[:, None], getattr(other, f), getattr(self, f)) for f in _GROUP)
        )


_GROUP = tuple(field.name for field in fields(_Group))


def step_block(block: UnitBlock) -> torch.Tensor:
    """Step one block in torch: the reference, and what devices without a kernel use."""
    book, width = block.book, block.book.width
    multipliers = torch.tensor(book.multipliers, device=block.d.device)
    codes = Codes(block.entry, block.signs, block.integer, block.d[:, None])
    before = book.decoded(codes)
    values, levels, slope = before.clone(), book.levels(codes), block.gradient.clone()
    free = block.d != 0
    halves = halves_of(book, block.entry)
    for index in range(BLOCK // book.group):
        own = slice(index * book.group, (index + 1) * book.group)
        entries = slice(own.start // width, own.stop // width)
        integer, half = block.integer[:, index].long(), halves[:, index]
        now = _Group(values[:, own], levels[:, own], slope[:, own], block.entry[:, entries].long())
        tried, _ = _try_group(block, index, now, block.d * multipliers[integer], half)
        now = best = now.where(free, tried)
        best_integer, best_gain = integer, torch.zeros_like(block.d)
        other = _next_integers(block, own, now, integer)
        tried, gain = _try_group(block, index, now, block.d * multipliers[other], half)
        good = free & (other != integer) & (gain < best_gain)
        best, best_gain = best.where(good, tried), torch.where(good, gain, best_gain)
        best_integer = torch.where(good, other, integer)
        if book.halves:
            moved = (now.entry + len(book.entries) // 2) % len(book.entries)
            table = torch.from_numpy(book.entries).to(block.d.device)
            start = replace(now, entry=moved, levels=table[moved].flatten(1))
            tried, gain = _try_group(block, index, start, block.d * multipliers[integer], 1 - half)
            good = free & (gain < best_gain)
            best, best_integer = best.where(good, tried), torch.where(good, integer, best_integer)
        step = best.values - values[:, own]
        slope.addmm_(step, block.hessian[own])
        values[:, own], levels[:, own] = best.values, best.levels
        block.entry[:, entries] = best.entry.to(torch.int16)
        block.integer[:, index] = best_integer.to(torch.int16)
        if book.has_signs:
            signs = sign_bytes(best.levels.unflatten(1, (-1, UNIT)))
            block.signs[:, own.start // UNIT : own.stop // UNIT] = torch.where(
                free[:, None], signs, block.signs[:, own.start // UNIT : own.stop // UNIT]
            )
    _fit_d(
        block, levels * multipliers[block.integer.long()].repeat_interleave(book.group, 1), slope
    )
    codes = Codes(block.entry, block.signs, block.integer, block.d[:, None])
    return book.decoded(codes) - before


def _next_integers(
    block: UnitBlock, own: slice, now: _Group, integer: torch.Tensor
) -> torch.Tensor:
    """The integers to try for a group of every row: the neighbors towards the best scale of its
    levels, or `integer` where that is near enough.
    """
    multipliers = torch.tensor(block.book.multipliers, device=integer.device)
    curvature = ((now.values @ block.hessian[own, own]) * now.values).sum(1)
    away = (now.values * now.slope).sum(1) * multipliers[integer]
    near = away.abs() <= LEAST_STEP * (multipliers[1] - multipliers[0]) * curvature
    tried = torch.where(near, integer, integer + torch.where(away > 0, -1, 1))
    return tried.clamp(0, len(multipliers) - 1)


def _try_group(
    block: UnitBlock, index: int, now: _Group, scale: torch.Tensor, half: torch.Tensor
) -> tuple[_Group, torch.Tensor]:
    """Give a group of every row this scale, then its units in turn their best entries of a half;
    return what it becomes and what that adds to the error, float32 (n_rows,).
    """
    book, width = block.book, block.book.width
    first = index * book.group
    own = slice(first, first + book.group)
    hessian = block.hessian[own, own]
    values, levels, slope, entry = (
        now.levels * scale[:, None],
        *(getattr(now, f).clone() for f in _GROUP[1:]),
    )
    step = values - now.values
    slope += step @ hessian
    gain = (step * (now.slope + slope)).sum(1)
    scale = torch.where(scale == 0, 1.0, scale)[:, None]
    for unit in range(book.group // UNIT):
        own = slice(UNIT * unit, UNIT * (unit + 1))
        metric = hessian[own, own]
        target = values[:, own] - slope[:, own] @ block.inverses[first // UNIT + unit]
        chosen = choose(book, target / scale, metric, half)
        step = chosen.levels * scale - values[:, own]
        change = (step * (2 * slope[:, own] + step @ metric)).sum(1)
        good = change < 0
        gain += torch.where(good, change, 0.0)
        step = torch.where(good[:, None], step, 0.0)
        slope += step @ hessian[own]
        levels[:, own] = torch.where(good[:, None], chosen.levels, levels[:, own])
        values[:, own] = levels[:, own] * scale
        entries = slice(own.start // width, own.stop // width)
        entry[:, entries] = torch.where(good[:, None], chosen.entry, entry[:, entries])
    return _Group(values, levels, slope, entry), gain


def _fit_d(block: UnitBlock, unit: torch.Tensor, slope: torch.Tensor) -> None:
    """d by least squares, rounded to float16, where that helps; `unit` (n_rows, 256) are the values
    without d.
    """
    along = (unit * slope).sum(1)
    curvature = ((unit @ block.hessian) * unit).sum(1)
    free = (curvature > 0) & (block.d != 0)
    wanted = block.d - along / torch.where(free, curvature, 1.0)
    step = wanted.half().float() - block.d
    good = free & (step * (2 * along + step * curvature) < 0)
    block.d.add_(torch.where(good, step, 0.0))
