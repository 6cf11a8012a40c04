"""GPTQ and descent onto codebooks, eight columns at a time.

Block feedback (LDLQ over blocks, Tseng et al. 2024, arXiv:2402.04396; GPTQ, arXiv:2210.17323, is
the case of single columns): units of eight neighboring columns are taken in the order of falling
importance. What an error e of a unit costs, once all columns still to come have made up for what
they can, is e M eᵀ with M = (Uᵀ U)⁻¹ of the unit's own part of the factor U; entry and signs are
chosen by it, and the error is spread over those columns by U. Scales stay.

The descent then takes every unit again, all others fixed, where M is the unit's own part of H; and
with it the integer that scales its group, and d. No step lets tr(E H Eᵀ) rise.

Everything here is a pure function of torch tensors, float32, on the device of its arguments. On a
CPU compiled kernels do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import torch

from quantkit.ggml.codebooks import BLOCK, UNIT, Codebook, Codes
from quantkit.ggml.types import QuantType
from quantkit.gptq import kernels_codebooks as kernels
from quantkit.gptq.codebook_units import N_LISTED, N_ROUNDS, choose, sign_bytes
from quantkit.gptq.products import add_product, product
from quantkit.gptq.solver import Factor, sweep

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


def feedback(
    book: Codebook,
    packed: torch.Tensor,
    weight: torch.Tensor,
    factor: Factor,
    walk: Walk | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) with the scales of `packed` and entries and
    signs by block feedback of `weight`, float32 (n_rows, n_columns). `factor` is of units of eight.
    `walk` replaces the fastest walk of the device, for tests.
    """
    codes = book.codes(packed)
    order = factor.order.view(-1, UNIT)[:, 0] // UNIT
    blocks = factor.upper.unflatten(0, (-1, UNIT)).unflatten(2, (-1, UNIT))
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    one = torch.eye(UNIT, device=own.device).expand_as(own)
    inverse = torch.linalg.solve_triangular(own.contiguous(), one, upper=True)
    n_units, n_rows = len(order), len(packed)
    per_unit = UNIT // book.width
    stack = UnitStack(
        book,
        weight.T[factor.order].contiguous(),
        (inverse @ inverse.mT).contiguous(),
        order * UNIT // book.group,
        book.scale(codes).T.contiguous(),
        _halves(book, codes.entry).T.to(torch.uint8).contiguous(),
        torch.empty((n_units * per_unit, n_rows), dtype=torch.int16, device=packed.device),
        torch.zeros((n_units, n_rows), dtype=torch.uint8, device=packed.device),
    )
    walk = walk or _WALKS.get(packed.device.type, walk_units)
    sweep(stack, factor.upper, 0, len(factor.order), walk)
    entry, signs = torch.empty_like(stack.entry), torch.empty_like(stack.signs)
    entry.unflatten(0, (-1, per_unit))[order] = stack.entry.unflatten(0, (-1, per_unit))
    signs[order] = stack.signs
    return book.pack(replace(codes, entry=entry.T, signs=signs.T))


def _halves(book: Codebook, entry: torch.Tensor) -> torch.Tensor:
    """The half of the table that every group uses: int64 (n_rows, n_groups)."""
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


@cache
def _kernel_book(qtype: QuantType) -> kernels.Book:
    from quantkit.ggml.codebooks import CODEBOOKS

    book = CODEBOOKS[qtype]
    return kernels.Book(
        book.entries,
        np.ascontiguousarray(book.entries.T),
        (2 if book.signs_are_even else 1) if book.has_signs else 0,
        book.group,
        np.array(book.multipliers, np.float32),
        int(book.halves),
        N_LISTED[book.width],
        N_ROUNDS,
        np.float32(LEAST_STEP),
    )


def _walk_units_cpu(stack: UnitStack, upper: torch.Tensor, start: int, end: int) -> None:
    units = slice(start // UNIT, end // UNIT)
    entries = slice(start // stack.book.width, end // stack.book.width)
    kernels.feed(
        stack.weight[start:end].numpy(),
        upper[start:end, start:end].contiguous().numpy(),
        stack.metrics[units].numpy(),
        stack.scale.numpy(),
        stack.group_of[units].numpy(),
        stack.half.numpy(),
        _kernel_book(stack.book.qtype),
        stack.entry[entries].numpy(),
        stack.signs[units].numpy(),
    )


_WALKS: dict[str, Walk] = {"cpu": _walk_units_cpu}


@dataclass(frozen=True)
class UnitBlock:
    """A block of 256 columns of all rows; steps change the tensors in place.

    `entry` int16 (n_rows, 256 / width), `signs` uint8 (n_rows, 32), `integer` int16 (n_rows,
    n_groups), `d` float32 (n_rows,), `gradient` E H float32 (n_rows, 256); `hessian` (256, 256) is
    the block's own, `inverses` (32, 8, 8) those of its units.
    """

    book: Codebook
    entry: torch.Tensor
    signs: torch.Tensor
    integer: torch.Tensor
    d: torch.Tensor
    gradient: torch.Tensor
    hessian: torch.Tensor
    inverses: torch.Tensor


Step = Callable[[UnitBlock], torch.Tensor]
"""Descends on one block; returns what that added to the values, float32 (n_rows, 256)."""


def descend(
    book: Codebook,
    packed: torch.Tensor,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    n_sweeps: int,
    step: Step | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) after `n_sweeps` of descent on tr(E H Eᵀ).

    `weight` is float32 (n_rows, n_columns), `hessian` float32 (n, n). `step` replaces the fastest
    step of the device, for tests.
    """
    step = step or _STEPS.get(packed.device.type, step_block)
    codes = book.codes(packed)
    gradient = product(book.decoded(codes) - weight, hessian)
    n_blocks = codes.d.shape[1]
    columns = [slice(index * BLOCK, (index + 1) * BLOCK) for index in range(n_blocks)]
    blocks = [
        _block(book, codes, index, gradient[:, own], hessian[own, own].contiguous())
        for index, own in enumerate(columns)
    ]
    for _ in range(n_sweeps):
        for block, own in zip(blocks, columns, strict=True):
            add_product(gradient, step(block), hessian[own])
    return _packed(book, blocks)


def fit_scales(
    book: Codebook,
    packed: torch.Tensor,
    weight: torch.Tensor,
    importance: torch.Tensor,
    step: Step | None = None,
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) after a sweep of descent under importances
    alone, float32 (n_columns,). ggml's scales are too large for what is rounded with them: it does
    not look at codes again once it has rounded scales.
    """
    step = step or _STEPS.get(packed.device.type, step_block)
    codes = book.codes(packed)
    gradient = (book.decoded(codes) - weight) * importance
    blocks = []
    for index in range(codes.d.shape[1]):
        own = slice(index * BLOCK, (index + 1) * BLOCK)
        hessian = torch.diag(importance[own])
        blocks.append(_block(book, codes, index, gradient[:, own], hessian))
        step(blocks[-1])
    return _packed(book, blocks)


def _block(
    book: Codebook, codes: Codes, index: int, gradient: torch.Tensor, hessian: torch.Tensor
) -> UnitBlock:
    n_blocks = codes.d.shape[1]
    entry, signs, integer = (
        x.chunk(n_blocks, 1)[index].contiguous() for x in (codes.entry, codes.signs, codes.integer)
    )
    own = hessian.view(-1, UNIT, BLOCK // UNIT, UNIT).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverses = torch.linalg.inv(own).contiguous()
    d = codes.d[:, index].contiguous()
    return UnitBlock(book, entry, signs, integer, d, gradient, hessian, inverses)


def _packed(book: Codebook, blocks: Sequence[UnitBlock]) -> torch.Tensor:
    """The bytes of a row's blocks."""
    entry, signs, integer = (
        torch.cat([getattr(block, name) for block in blocks], 1)
        for name in ("entry", "signs", "integer")
    )
    return book.pack(Codes(entry, signs, integer, torch.stack([b.d for b in blocks], 1)))


def _step_block_cpu(block: UnitBlock) -> torch.Tensor:
    change = torch.empty(block.gradient.shape)
    kernels.descend(
        block.entry.numpy(),
        block.signs.numpy(),
        block.integer.numpy(),
        block.d.numpy(),
        block.gradient.contiguous().numpy(),
        change.numpy(),
        block.hessian.numpy(),
        block.inverses.numpy(),
        _kernel_book(block.book.qtype),
    )
    return change


_STEPS: dict[str, Step] = {"cpu": _step_block_cpu}


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
    halves = _halves(book, block.entry)
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
