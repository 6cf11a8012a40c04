"""The column-by-column parts of GPTQ and of the descent on a CPU, compiled by numba.

Rows are independent: a thread owns some rows and walks the columns with everything it needs in its
caches. Arrays are transposed, so that a column's data of neighboring rows fill vector registers.
The same walks in torch (`quantkit.gptq.solver.walk_columns`, `quantkit.gptq.descent.step_block`)
are the references; they spend their time on calls and thread barriers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantkit.gptq.compiled import numba, over_rows
from quantkit.gptq.roundings_cpu import round_to_half, round_to_power

_TILE = 64  # rows of one task; in GPTQ's walk 128 columns x 64 rows of float32 are 32 kB
_FAST = {"contract", "reassoc", "nsz"}  # never nnan: rows may hold anything


@numba.njit(inline="always")
def _nearest(level, table):  # type: ignore[no-untyped-def]
    """Index of the table entry nearest to `level`; the table rises."""
    best = 0
    for i in range(1, table.size):
        if level > (table[i - 1] + table[i]) * np.float32(0.5):
            best = i
    return best


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _gptq_rows(weight, upper, scale, minimum, group_of, low, high, table, codes, first, last):  # type: ignore[no-untyped-def]
    """GPTQ on one block of columns for rows first..last. `weight` (n_columns, n_rows) becomes
    the scaled errors.
    """
    n_columns = weight.shape[0]
    n_rows = last - first
    errors = np.empty((n_columns, n_rows), np.float32)
    value = np.empty(n_rows, np.float32)
    for column in range(n_columns):
        for row in range(n_rows):
            value[row] = weight[column, first + row]
        for before in range(column):  # left-looking: what the columns already decided left behind
            share = upper[before, column]
            for row in range(n_rows):
                value[row] -= share * errors[before, row]
        group = group_of[column]
        inverse = np.float32(1) / upper[column, column]
        if table.size == 0:
            for row in range(n_rows):
                s = scale[group, first + row]
                m = minimum[group, first + row]
                step = s if s != 0 else np.float32(1)
                code = np.rint((value[row] - m) / step)
                code = min(max(code, low[first + row]), high[first + row])
                codes[column, first + row] = np.int8(code)
                errors[column, row] = (value[row] - (code * s + m)) * inverse
        else:
            for row in range(n_rows):
                s = scale[group, first + row]
                best = _nearest(value[row] / (s if s != 0 else np.float32(1)), table)
                codes[column, first + row] = best
                errors[column, row] = (value[row] - table[best] * s) * inverse
    for column in range(n_columns):
        for row in range(n_rows):
            weight[column, first + row] = errors[column, row]


def gptq(
    weight: np.ndarray,
    upper: np.ndarray,
    scale: np.ndarray,
    minimum: np.ndarray,
    group_of: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    table: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Decide one block of columns.

    `weight` float32 and `codes` int8 are (n_columns, n_rows), written in place: weights become
    scaled errors. `upper` is the block's own (n_columns, n_columns) part of the factor. `scale`,
    `minimum` are (n_groups, n_rows), `group_of` (n_columns,) int64, `low`, `high` (n_rows,)
    float32, `table` (16,) float32 or empty.
    """

    def work(first: int, last: int) -> None:
        _gptq_rows(weight, upper, scale, minimum, group_of, low, high, table, codes, first, last)

    over_rows(weight.shape[1], _TILE, work)


class Shape(NamedTuple):
    """The properties of a format that the descent needs."""

    width: int  # columns of a block
    group: int
    low: int
    high: int
    dmin_sign: int
    is_power: bool  # d is a power of two, and not a float16


@numba.njit(inline="always")
def _apply(slope, step, hessian, column, first, last):  # type: ignore[no-untyped-def]
    """slope[other] += hessian[column, other] * step for columns first..last."""
    lanes = step.size
    for other in range(first, last):
        share = hessian[column, other]
        for lane in range(lanes):
            slope[other, lane] += share * step[lane]


@numba.njit(inline="always")
def _any(step):  # type: ignore[no-untyped-def]
    found = np.float32(0)
    for lane in range(step.size):
        found += abs(step[lane])
    return found != 0


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _move_codes(codes, level, slope, moved, d, scale, hessian, table, shape, first):  # type: ignore[no-untyped-def]
    """Every code of the block at column `first` in turn, all else fixed."""
    low, high, lanes = np.float32(shape.low), np.float32(shape.high), slope.shape[1]
    step = np.zeros(lanes, np.float32)
    wanted = np.zeros(lanes, np.float32)
    index = np.zeros(lanes, np.int32)
    for column in range(first, first + shape.width):
        group = column // shape.group
        curvature = hessian[column, column]
        for lane in range(lanes):
            worth = d[lane] * scale[group, lane]
            free = worth if worth != 0 else np.float32(1)
            wanted[lane] = level[column, lane] - slope[column, lane] / (curvature * free)
        if table.size == 0:
            for lane in range(lanes):
                new = min(max(np.rint(wanted[lane]), low), high)
                worth = d[lane] * scale[group, lane]
                new = new if worth != 0 else level[column, lane]
                step[lane] = (new - level[column, lane]) * worth
                level[column, lane] = new
                codes[column, lane] = np.int8(new)
        else:
            index[:] = 0
            for i in range(1, table.size):
                middle = (table[i - 1] + table[i]) * np.float32(0.5)
                for lane in range(lanes):
                    index[lane] += np.int32(wanted[lane] > middle)
            for lane in range(lanes):
                worth = d[lane] * scale[group, lane]
                if worth != 0:
                    codes[column, lane] = np.int8(index[lane])
                new = table[codes[column, lane]]
                step[lane] = (new - level[column, lane]) * worth
                level[column, lane] = new
        if _any(step):
            for lane in range(lanes):
                moved[column, lane] += step[lane]
            _apply(slope, step, hessian, column, first, first + shape.width)


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _move_integers(integers, unit, basis, slope, moved, hessian, shape, first, group, low, high):  # type: ignore[no-untyped-def]
    """The integers (lanes,) of one group, each worth `unit` times `basis` (group, lanes)."""
    own, lanes = group * shape.group, slope.shape[1]
    slopes = np.zeros(lanes, np.float32)
    curvature = np.zeros(lanes, np.float32)
    inner = np.zeros(lanes, np.float32)
    step = np.zeros(lanes, np.float32)
    part = np.zeros(lanes, np.float32)
    for i in range(shape.group):
        inner[:] = 0
        for j in range(shape.group):
            share = hessian[own + i, own + j]
            for lane in range(lanes):
                inner[lane] += share * basis[j, lane]
        for lane in range(lanes):
            slopes[lane] += basis[i, lane] * slope[own + i, lane]
            curvature[lane] += inner[lane] * basis[i, lane]
    for lane in range(lanes):
        free = curvature[lane] > 0 and unit[lane] != 0
        old = integers[lane]
        new = np.rint(old - slopes[lane] / (curvature[lane] * unit[lane] if free else 1))
        new = min(max(np.float32(new), np.float32(low)), np.float32(high))
        change = (new - old) * unit[lane]
        gain = 2 * change * slopes[lane] + change * change * curvature[lane]
        good = free and gain < 0
        integers[lane] = new if good else old
        step[lane] = change if good else np.float32(0)
    if _any(step):
        for i in range(shape.group):
            for lane in range(lanes):
                part[lane] = step[lane] * basis[i, lane]
                moved[own + i, lane] += part[lane]
            _apply(slope, part, hessian, own + i, first, first + shape.width)


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _fit_halves(level, slope, moved, d, dmin, scale, minimum, hessian, group_sums, shape, first):  # type: ignore[no-untyped-def]
    """d and dmin (lanes,) of the block together; `dmin` is empty where there is none."""
    lanes = slope.shape[1]
    zeros = np.zeros((9, lanes), np.float32)
    au, uu, av, uv, vv, inner, by_group, step_d, step_m = zeros
    u = np.empty((shape.width, lanes), np.float32)
    sign = np.float32(shape.dmin_sign)
    last = first + shape.width
    for column in range(first, last):
        for lane in range(lanes):
            u[column - first, lane] = level[column, lane] * scale[column // shape.group, lane]
    for column in range(first, last):
        group = column // shape.group
        inner[:] = 0
        for other in range(shape.width):
            share = hessian[first + other, column]
            for lane in range(lanes):
                inner[lane] += share * u[other, lane]
        for lane in range(lanes):
            au[lane] += u[column - first, lane] * slope[column, lane]
            uu[lane] += u[column - first, lane] * inner[lane]
        if dmin.size > 0:
            for lane in range(lanes):
                v = sign * minimum[group, lane]
                av[lane] += v * slope[column, lane]
                uv[lane] += v * inner[lane]
    if dmin.size > 0:
        for group in range(first // shape.group, last // shape.group):
            by_group[:] = 0
            for other in range(first // shape.group, last // shape.group):
                for lane in range(lanes):
                    by_group[lane] += group_sums[group, other] * minimum[other, lane]
            for lane in range(lanes):
                vv[lane] += minimum[group, lane] * by_group[lane]
    for lane in range(lanes):
        free = uu[lane] > 0
        to_d = -au[lane] / uu[lane] if free else np.float32(0)
        to_m = np.float32(0)
        det = uu[lane] * vv[lane] - uv[lane] * uv[lane]
        if det > np.float32(1e-6) * uu[lane] * vv[lane]:
            to_d = -(vv[lane] * au[lane] - uv[lane] * av[lane]) / det
            to_m = -(uu[lane] * av[lane] - uv[lane] * au[lane]) / det
        step_d[lane] = d[lane] + to_d
        step_m[lane] = (dmin[lane] if dmin.size > 0 else np.float32(0)) + to_m
    if shape.is_power:
        round_to_power(step_d)
    else:
        round_to_half(step_d)
    round_to_half(step_m)
    for lane in range(lanes):
        by_d = step_d[lane] - d[lane]
        by_m = step_m[lane] - dmin[lane] if dmin.size > 0 else np.float32(0)
        gain = 2 * (by_d * au[lane] + by_m * av[lane]) + by_d * by_d * uu[lane]
        gain += 2 * by_d * by_m * uv[lane] + by_m * by_m * vv[lane]
        good = uu[lane] > 0 and gain < 0
        step_d[lane] = by_d if good else np.float32(0)
        step_m[lane] = by_m if good else np.float32(0)
        d[lane] += step_d[lane]
        if dmin.size > 0:
            dmin[lane] += step_m[lane]
    for column in range(first, last):
        for lane in range(lanes):
            v = sign * minimum[column // shape.group, lane] if dmin.size > 0 else np.float32(0)
            moved[column, lane] += step_d[lane] * u[column - first, lane] + step_m[lane] * v


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _descend_rows(  # type: ignore[no-untyped-def]
    codes,
    gradient,
    change,
    d,
    dmin,
    scale,
    minimum,
    hessian,
    group_sums,
    table,
    shape,
    limits,
    first,
    last,
):
    """The window's blocks for rows first..last."""
    n, n_columns, n_groups, n_blocks = last - first, len(codes), len(scale), len(d)
    lanes = n
    tile_codes = np.zeros((n_columns, lanes), np.int8)
    level = np.zeros((n_columns, lanes), np.float32)
    slope = np.zeros((n_columns, lanes), np.float32)
    moved = np.zeros((n_columns, lanes), np.float32)
    tile_d = np.zeros((n_blocks, lanes), np.float32)
    tile_dmin = np.zeros((n_blocks, lanes if len(dmin) > 0 else 0), np.float32)
    tile_scale = np.zeros((n_groups, lanes), np.float32)
    tile_minimum = np.zeros((n_groups, lanes), np.float32)
    ones = np.ones((shape.group, lanes), np.float32)
    unit = np.zeros(lanes, np.float32)
    tile_codes[:] = codes[:, first:last]
    slope[:] = gradient[:, first:last]
    tile_d[:] = d[:, first:last]
    tile_scale[:] = scale[:, first:last]
    tile_minimum[:] = minimum[:, first:last]
    if len(dmin) > 0:
        tile_dmin[:] = dmin[:, first:last]
    for column in range(n_columns):
        for lane in range(lanes):
            code = tile_codes[column, lane]
            level[column, lane] = np.float32(code) if table.size == 0 else table[code]

    for block in range(n_blocks):
        at = block * shape.width
        end = at + shape.width
        own_d, own_dmin = tile_d[block], tile_dmin[block]
        _move_codes(tile_codes, level, slope, moved, own_d, tile_scale, hessian, table, shape, at)
        for group in range(at // shape.group, end // shape.group):
            if limits[0] <= limits[1]:
                basis = level[group * shape.group : (group + 1) * shape.group]
                integers = tile_scale[group]
                _move_integers(
                    integers,
                    own_d,
                    basis,
                    slope,
                    moved,
                    hessian,
                    shape,
                    at,
                    group,
                    limits[0],
                    limits[1],
                )
            if limits[2] <= limits[3]:
                for lane in range(lanes):
                    unit[lane] = np.float32(shape.dmin_sign) * own_dmin[lane]
                integers = tile_minimum[group]
                _move_integers(
                    integers,
                    unit,
                    ones,
                    slope,
                    moved,
                    hessian,
                    shape,
                    at,
                    group,
                    limits[2],
                    limits[3],
                )
        _fit_halves(
            level,
            slope,
            moved,
            own_d,
            own_dmin,
            tile_scale,
            tile_minimum,
            hessian,
            group_sums,
            shape,
            at,
        )
        for other in range(end, n_columns):  # the window's other blocks hear of it
            for column in range(at, end):
                share = hessian[column, other]
                for lane in range(lanes):
                    slope[other, lane] += share * moved[column, lane]

    codes[:, first:last] = tile_codes
    change[:, first:last] = moved
    d[:, first:last] = tile_d
    scale[:, first:last] = tile_scale
    minimum[:, first:last] = tile_minimum
    if len(dmin) > 0:
        dmin[:, first:last] = tile_dmin


def descend(
    codes: np.ndarray,
    gradient: np.ndarray,
    change: np.ndarray,
    d: np.ndarray,
    dmin: np.ndarray,
    scale: np.ndarray,
    minimum: np.ndarray,
    hessian: np.ndarray,
    group_sums: np.ndarray,
    table: np.ndarray,
    shape: Shape,
    limits: tuple[int, int, int, int],
) -> None:
    """Descend on a window of blocks, one after the other, of all rows, in place; `change` is filled
    with what was added to the values. The gradient is left to the caller.

    `codes` int8, `gradient`, `change` float32 are (n_columns, n_rows), `d`, `dmin` (n_blocks,
    n_rows) (`dmin` without rows where the format has none), `scale`, `minimum` (n_groups, n_rows),
    `hessian` the window's own (n_columns, n_columns), C-contiguous, `group_sums` (n_groups,
    n_groups) its sums over groups; `table` (16,) or empty. `limits` are the ranges of the integer
    scales and minimums, low above high where there are none.
    """

    def work(first: int, last: int) -> None:
        _descend_rows(
            codes,
            gradient,
            change,
            d,
            dmin,
            scale,
            minimum,
            hessian,
            group_sums,
            table,
            shape,
            limits,
            first,
            last,
        )

    over_rows(codes.shape[1], _TILE, work)
