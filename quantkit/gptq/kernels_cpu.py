"""The column-by-column parts of GPTQ and of the descent on a CPU, compiled by numba.

Rows are independent: a thread owns some rows and walks the columns with everything it needs in its
caches. The same walks in torch (`quantkit.gptq.solver.walk_columns`,
`quantkit.gptq.descent.walk_blocks`) are the references; they spend their time on calls and thread
barriers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

_TILE = 64  # rows of one task; in GPTQ's walk 128 columns x 64 rows of float32 are 32 kB
_FAST = {"contract", "reassoc", "nsz"}  # never nnan: rows may hold anything


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "gptq")


def _over_tiles(n_rows: int, work: Callable[[int, int], None]) -> None:
    list(
        _pool().map(lambda first: work(first, min(first + _TILE, n_rows)), range(0, n_rows, _TILE))
    )


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

    _over_tiles(weight.shape[1], work)


class Shape(NamedTuple):
    """What the descent has to know of a format."""

    group: int
    low: int
    high: int
    dmin_sign: int


@numba.njit(nogil=True, cache=True)
def round_to_half(x):  # type: ignore[no-untyped-def]
    """float32 `x` rounded to the nearest float16, ties to even, as a float32; the largest
    finite one where it overflows.
    """
    size = abs(x)
    if size < np.float32(6.103515625e-05):  # subnormal: multiples of 2^-24
        return np.float32(np.rint(x * np.float32(16777216.0)) * np.float32(5.9604644775390625e-08))
    if size > np.float32(65504.0):
        return np.float32(65504.0) if x > 0 else np.float32(-65504.0)
    exponent = math.frexp(size)[1] - 1
    spacing = np.float32(math.ldexp(1.0, exponent - 10))
    return np.float32(np.rint(x / spacing) * spacing)


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _add_row(target, step, hessian, column):  # type: ignore[no-untyped-def]
    """target += step * hessian[column]."""
    for other in range(target.size):
        target[other] += step * hessian[column, other]


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _times(hessian, vector, product):  # type: ignore[no-untyped-def]
    """product = hessian @ vector; the hessian is symmetric, so its rows serve as columns."""
    product[:] = 0
    for i in range(vector.size):
        _add_row(product, vector[i], hessian, i)


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _step_integer(old, unit, basis, first, gradient, hessian, low, high):  # type: ignore[no-untyped-def]
    """The best storable change of one integer (a group's scale or minimum), `unit` being its worth.

    `basis` (group,) is what the integer times `unit` is multiplied with in columns first...;
    returns the new integer.
    """
    n = basis.size
    slope = np.float32(0)
    curvature = np.float32(0)
    for i in range(n):
        slope += basis[i] * gradient[first + i]
        inner = np.float32(0)
        for j in range(n):
            inner += hessian[first + i, first + j] * basis[j]
        curvature += inner * basis[i]
    if not curvature > 0:
        return old
    new = np.rint(old - slope / (curvature * unit))
    new = min(max(new, np.float32(low)), np.float32(high))
    step = (new - old) * unit
    return new if 2 * step * slope + step * step * curvature < 0 else old


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _descend_rows(  # type: ignore[no-untyped-def]
    codes, gradient, steps, d, dmin, scale, minimum, hessian, table, shape, limits, first, last
):
    """One block of columns, rows first..last; see `quantkit.gptq.descent` for the order of
    steps.
    """
    group = shape.group
    sign = np.float32(shape.dmin_sign)
    width = codes.shape[1]
    has_min = dmin.size > 0
    plain = table.size == 0
    u, v = np.empty(width, np.float32), np.zeros(width, np.float32)
    hu, hv = np.empty(width, np.float32), np.zeros(width, np.float32)
    ones = np.ones(group, np.float32)
    for row in range(first, last):
        slope = gradient[row]
        for column in range(width):
            worth = d[row] * scale[row, column // group]
            if worth == 0:
                continue
            code = codes[row, column]
            old = np.float32(code) if plain else table[code]
            level = old - slope[column] / (hessian[column, column] * worth)
            if plain:
                new = min(max(np.rint(level), np.float32(shape.low)), np.float32(shape.high))
                codes[row, column] = np.int8(new)
            else:
                best = _nearest(level, table)
                codes[row, column] = best
                new = table[best]
            if new != old:
                steps[row, column] += (new - old) * worth
                _add_row(slope, (new - old) * worth, hessian, column)

        for column in range(width):
            u[column] = np.float32(codes[row, column]) if plain else table[codes[row, column]]
        for k in range(width // group):
            own = k * group
            if limits[0] <= limits[1] and d[row] != 0:
                old = scale[row, k]
                basis = u[own : own + group]
                new = _step_integer(old, d[row], basis, own, slope, hessian, limits[0], limits[1])
                if new != old:
                    scale[row, k] = new
                    for i in range(own, own + group):
                        steps[row, i] += (new - old) * d[row] * u[i]
                        _add_row(slope, (new - old) * d[row] * u[i], hessian, i)
            if limits[2] <= limits[3] and dmin[row] != 0:
                old = minimum[row, k]
                unit = sign * dmin[row]
                new = _step_integer(old, unit, ones, own, slope, hessian, limits[2], limits[3])
                if new != old:
                    minimum[row, k] = new
                    for i in range(own, own + group):
                        steps[row, i] += (new - old) * unit
                        _add_row(slope, (new - old) * unit, hessian, i)

        for column in range(width):  # d and dmin together
            u[column] *= scale[row, column // group]
            if has_min:
                v[column] = sign * minimum[row, column // group]
        _times(hessian, u, hu)
        au, uu = _dot(u, slope), _dot(u, hu)
        if not uu > 0:
            continue
        to_d, to_m = -au / uu, np.float32(0)
        av = uv = vv = np.float32(0)
        if has_min:
            _times(hessian, v, hv)
            av, uv, vv = _dot(v, slope), _dot(v, hu), _dot(v, hv)
            det = uu * vv - uv * uv
            if det > np.float32(1e-6) * uu * vv:
                to_d = -(vv * au - uv * av) / det
                to_m = -(uu * av - uv * au) / det
        step_d = round_to_half(d[row] + to_d) - d[row]
        step_m = round_to_half(dmin[row] + to_m) - dmin[row] if has_min else np.float32(0)
        gain = 2 * (step_d * au + step_m * av)
        gain += step_d * step_d * uu + 2 * step_d * step_m * uv + step_m * step_m * vv
        if gain < 0:
            d[row] += step_d
            if has_min:
                dmin[row] += step_m
            for column in range(width):
                steps[row, column] += step_d * u[column] + step_m * v[column]


def descend(
    codes: np.ndarray,
    gradient: np.ndarray,
    steps: np.ndarray,
    d: np.ndarray,
    dmin: np.ndarray,
    scale: np.ndarray,
    minimum: np.ndarray,
    hessian: np.ndarray,
    table: np.ndarray,
    shape: Shape,
    limits: tuple[int, int, int, int],
) -> None:
    """Descend on one block of all rows, in place; `steps` collects what was added to the values.

    `codes` int8, `gradient`, `steps` float32 are (n_rows, width), `d`, `dmin` (n_rows,) (`dmin`
    empty where the format has none), `scale`, `minimum` (n_rows, groups of the block), `hessian`
    the block's own (width, width), C-contiguous; `table` (16,) or empty. `limits` are the ranges of
    the integer scales and minimums, low above high where there are none.
    """

    def work(first: int, last: int) -> None:
        _descend_rows(
            codes,
            gradient,
            steps,
            d,
            dmin,
            scale,
            minimum,
            hessian,
            table,
            shape,
            limits,
            first,
            last,
        )

    _over_tiles(codes.shape[0], work)
