"""The unit-by-unit parts of GPTQ and of the descent onto codebooks on a CPU, compiled by numba.

`quantkit.gptq.codebooks` says what is computed, and has the same in torch. Rows are independent: a
thread owns some rows and walks the units of eight columns, each for all its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantkit.gptq.compiled import numba, over_rows
from quantkit.gptq.kernels_codebook_units import (
    FAST,
    Book,
    add_norms,
    choose,
    make_scratch,
    sign_byte,
)
from quantkit.gptq.kernels_cpu import round_to_half

__all__ = ["Book", "descend", "feed"]

_TILE = 32  # rows of one task


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _feed_rows(  # type: ignore[no-untyped-def]
    weight, upper, metrics, scale, group_of, half, book, entry, signs, first, last
):
    n_columns, n_rows = weight.shape[0], last - first
    per_unit = entry.shape[0] // signs.shape[0]
    n_entries = len(book.entries)
    scratch = make_scratch(book)
    norms = np.zeros((per_unit, n_entries), np.float32)
    tile = np.zeros((n_rows, n_columns), np.float32)
    target = np.zeros(8, np.float32)
    for column in range(n_columns):
        for row in range(n_rows):
            tile[row, column] = weight[column, first + row]
    for unit in range(n_columns // 8):
        at, metric, group = 8 * unit, metrics[unit], group_of[unit]
        add_norms(book, metric, norms)
        for row in range(n_rows):
            own, s = tile[row], scale[group, first + row]
            low = half[group, first + row] * (n_entries // 2)
            high = low + n_entries // 2 if book.halves else n_entries
            chosen, other = low, low if per_unit == 2 else -1
            byte = 0
            if s != 0:
                for i in range(8):
                    target[i] = own[at + i] / s
                chosen, other = choose(book, norms, metric, target, low, high, scratch)
                byte = sign_byte(scratch.best, book.signs)
            entry[per_unit * unit, first + row] = chosen
            if per_unit == 2:
                entry[2 * unit + 1, first + row] = other
            signs[unit, first + row] = byte
            for i in range(8):  # the scaled errors: those of the unit by substitution
                error = own[at + i] - (scratch.best[i] * s if s != 0 else np.float32(0))
                error /= upper[at + i, at + i]
                own[at + i] = error
                for j in range(i + 1, 8):
                    own[at + j] -= error * upper[at + i, at + j]
            for i in range(8):
                error, share = own[at + i], upper[at + i]
                for column in range(at + 8, n_columns):
                    own[column] -= error * share[column]
    for column in range(n_columns):
        for row in range(n_rows):
            weight[column, first + row] = tile[row, column]


def feed(
    weight: np.ndarray,
    upper: np.ndarray,
    metrics: np.ndarray,
    scale: np.ndarray,
    group_of: np.ndarray,
    half: np.ndarray,
    book: Book,
    entry: np.ndarray,
    signs: np.ndarray,
) -> None:
    """Decide some units, in place: `weight` float32 (n_columns, n_rows) becomes scaled errors.

    `upper` is the columns' own part of the factor, `metrics` (n_units, 8, 8); `scale` float32 and
    `half` uint8 are (n_groups, n_rows), `group_of` int64 (n_units,). `entry` int16 (n_columns /
    width, n_rows) and `signs` uint8 (n_units, n_rows) are filled.
    """

    def work(first: int, last: int) -> None:
        _feed_rows(weight, upper, metrics, scale, group_of, half, book, entry, signs, first, last)

    over_rows(weight.shape[1], _TILE, work)


class _Group(NamedTuple):
    """The numbers of one group of one row."""

    values: np.ndarray  # float32 (group,), as are levels and slope
    levels: np.ndarray
    slope: np.ndarray
    entry: np.ndarray  # int16 (group / width,)


@numba.njit(nogil=True, cache=True)
def _group_of(n_columns, n_entries):  # type: ignore[no-untyped-def]
    return _Group(
        np.zeros(n_columns, np.float32),
        np.zeros(n_columns, np.float32),
        np.zeros(n_columns, np.float32),
        np.zeros(n_entries, np.int16),
    )


@numba.njit(nogil=True, cache=True)
def _copy(source, target):  # type: ignore[no-untyped-def]
    target.values[:] = source.values
    target.levels[:] = source.levels
    target.slope[:] = source.slope
    target.entry[:] = source.entry


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _try_group(book, norms, hessian, inverses, at, s, half, own, steps, target, scratch):  # type: ignore[no-untyped-def]
    """Give a group the scale `s`, then its units in turn their best entries of a half, in place.
    Return what that adds to the error: below zero where it is better.
    """
    width, n_entries = book.columns.shape[0], len(book.entries)
    per_unit = 8 // width
    low = half * (n_entries // 2)
    high = low + n_entries // 2 if book.halves else n_entries
    gain, differs = np.float32(0), False
    for i in range(book.group):
        steps[i] = own.levels[i] * s - own.values[i]
        differs = differs or steps[i] != 0
    if differs:  # 2 step g + step H step is the step times the slopes before and after
        for i in range(book.group):
            gain += steps[i] * own.slope[i]
        for i in range(book.group):
            share = hessian[at + i]
            for j in range(book.group):
                own.slope[j] += steps[i] * share[at + j]
        for i in range(book.group):
            gain += steps[i] * own.slope[i]
            own.values[i] = own.levels[i] * s
    for unit in range(book.group // 8):
        b = 8 * unit
        inverse, metric = (
            inverses[at // 8 + unit],
            hessian[at + b : at + b + 8, at + b : at + b + 8],
        )
        for i in range(8):
            away = np.float32(0)
            for j in range(8):
                away += inverse[i, j] * own.slope[b + j]
            target[i] = (own.values[b + i] - away) / s
        first, second = choose(book, norms[unit], metric, target, low, high, scratch)
        by_unit = np.float32(0)
        for i in range(8):
            steps[i] = scratch.best[i] * s - own.values[b + i]
        for i in range(8):
            inner = np.float32(0)
            for j in range(8):
                inner += metric[i, j] * steps[j]
            by_unit += steps[i] * (2 * own.slope[b + i] + inner)
        if by_unit < 0:
            gain += by_unit
            own.entry[per_unit * unit] = first
            if per_unit == 2:
                own.entry[2 * unit + 1] = second
            for i in range(8):
                own.levels[b + i] = scratch.best[i]
                own.values[b + i] = scratch.best[i] * s
                share = hessian[at + b + i]
                for j in range(book.group):
                    own.slope[j] += steps[i] * share[at + j]
    return gain


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _next_integer(book, hessian, at, values, slope, code):  # type: ignore[no-untyped-def]
    """Return the integer to try for a group: the neighbor towards the best scale of its levels, or
    `code` where that is near enough.
    """
    along, curvature = np.float32(0), np.float32(0)
    for i in range(book.group):
        share, inner = hessian[at + i], np.float32(0)
        for j in range(book.group):
            inner += share[at + j] * values[j]
        along += values[i] * slope[i]
        curvature += values[i] * inner
    step = book.multipliers[1] - book.multipliers[0]
    away = along * book.multipliers[code]
    if abs(away) <= book.least_step * step * curvature:
        return code
    tried = code - 1 if away > 0 else code + 1
    return min(max(tried, 0), len(book.multipliers) - 1)


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _fit_d(levels, integer, multipliers, group, slope, hessian, d):  # type: ignore[no-untyped-def]
    """Return the d of one block of a row by least squares, or `d` where that is no better."""
    n = len(levels)
    along, curvature = np.float32(0), np.float32(0)
    unit = np.zeros(n, np.float32)
    inner = np.zeros(n, np.float32)
    for i in range(n):
        unit[i] = levels[i] * multipliers[integer[i // group]]
    for i in range(n):
        share, own = hessian[i], unit[i]
        for j in range(n):
            inner[j] += own * share[j]
    for i in range(n):
        along += unit[i] * slope[i]
        curvature += unit[i] * inner[i]
    if not curvature > 0:
        return d
    wanted = np.zeros(1, np.float32)
    wanted[0] = d - along / curvature
    round_to_half(wanted)
    step = wanted[0] - d
    return wanted[0] if step * (2 * along + step * curvature) < 0 else d


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _descend_rows(  # type: ignore[no-untyped-def]
    entry, signs, integer, d, gradient, change, hessian, inverses, book, first, last
):
    n_rows, n_columns = last - first, hessian.shape[0]
    group, width, n_entries = book.group, book.columns.shape[0], len(book.entries)
    per_unit, per_group, half_size = 8 // width, group // 8, n_entries // 2
    n_own = group // width
    scratch = make_scratch(book)
    norms = np.zeros((per_group, per_unit, n_entries), np.float32)
    slope = np.zeros((n_rows, n_columns), np.float32)
    level = np.zeros((n_rows, n_columns), np.float32)
    value = np.zeros((n_rows, n_columns), np.float32)
    steps, target = np.zeros(group, np.float32), np.zeros(8, np.float32)
    now, other = _group_of(group, n_own), _group_of(group, n_own)
    best = _group_of(group, n_own)
    for row in range(n_rows):
        for column in range(n_columns):
            size = book.entries[entry[first + row, column // width], column % width]
            negative = (signs[first + row, column // 8] >> (column % 8)) & 1
            size = -size if negative else size
            scale = d[first + row] * book.multipliers[integer[first + row, column // group]]
            slope[row, column] = gradient[first + row, column]
            level[row, column] = size
            value[row, column] = size * scale
            change[first + row, column] = -value[row, column]
    for index in range(n_columns // group):
        at = index * group
        for unit in range(per_group):
            b = at + 8 * unit
            add_norms(book, hessian[b : b + 8, b : b + 8], norms[unit])
        for row in range(n_rows):
            own_d, code = d[first + row], integer[first + row, index]
            if own_d == 0:
                continue
            now.values[:] = value[row, at : at + group]
            now.levels[:] = level[row, at : at + group]
            now.slope[:] = slope[row, at : at + group]
            now.entry[:] = entry[first + row, index * n_own : (index + 1) * n_own]
            half = 1 if book.halves and now.entry[0] >= half_size else 0
            s = own_d * book.multipliers[code]
            _try_group(book, norms, hessian, inverses, at, s, half, now, steps, target, scratch)
            _copy(now, best)
            best_gain, best_code = np.float32(0), code
            tried = _next_integer(book, hessian, at, now.values, now.slope, code)
            if tried != code:
                _copy(now, other)
                s = own_d * book.multipliers[tried]
                gain = _try_group(
                    book, norms, hessian, inverses, at, s, half, other, steps, target, scratch
                )
                if gain < best_gain:
                    best_gain, best_code = gain, tried
                    _copy(other, best)
            if book.halves:
                _copy(now, other)
                shift = half_size - 2 * half * half_size
                for i in range(n_own):
                    other.entry[i] += shift
                    for j in range(width):
                        other.levels[i * width + j] = book.entries[other.entry[i], j]
                s = own_d * book.multipliers[code]
                gain = _try_group(
                    book, norms, hessian, inverses, at, s, 1 - half, other, steps, target, scratch
                )
                if gain < best_gain:
                    best_gain, best_code = gain, code
                    _copy(other, best)
            integer[first + row, index] = best_code
            for i in range(n_own):
                entry[first + row, index * n_own + i] = best.entry[i]
            for unit in range(per_group):
                byte = sign_byte(best.levels[8 * unit : 8 * unit + 8], book.signs)
                signs[first + row, at // 8 + unit] = byte
            for i in range(group):
                level[row, at + i] = best.levels[i]  # another one may give the same value
                step = best.values[i] - value[row, at + i]
                if step != 0:
                    value[row, at + i] = best.values[i]
                    share = hessian[at + i]
                    for j in range(n_columns):
                        slope[row, j] += step * share[j]
    for row in range(n_rows):
        codes = integer[first + row]
        own_d = d[first + row]
        if own_d != 0:
            own_d = _fit_d(level[row], codes, book.multipliers, group, slope[row], hessian, own_d)
        d[first + row] = own_d
        for column in range(n_columns):
            scale = own_d * book.multipliers[codes[column // group]]
            change[first + row, column] += level[row, column] * scale


def descend(
    entry: np.ndarray,
    signs: np.ndarray,
    integer: np.ndarray,
    d: np.ndarray,
    gradient: np.ndarray,
    change: np.ndarray,
    hessian: np.ndarray,
    inverses: np.ndarray,
    book: Book,
) -> None:
    """Descend on one block of 256 columns of all rows, in place; `change` float32 (n_rows, 256) is
    filled with what was added to the values. The gradient is left to the caller.

    `entry` int16 (n_rows, 256 / width), `signs` uint8 (n_rows, 32), `integer` int16 (n_rows,
    n_groups), `d` float32 (n_rows,), `gradient` float32 (n_rows, 256); `hessian` is the block's own
    (256, 256), `inverses` (32, 8, 8) those of its units.
    """

    def work(first: int, last: int) -> None:
        _descend_rows(
            entry, signs, integer, d, gradient, change, hessian, inverses, book, first, last
        )

    over_rows(len(entry), _TILE, work)
