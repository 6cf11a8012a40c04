"""The column-by-column part of GPTQ on a CPU, compiled by numba.

Rows are independent: a thread owns a tile of rows and walks a block of columns with everything in
its L1 cache. The same walk in torch (`quantkit.gptq.solver.sweep_leaf`) is the reference; it spends
its time on calls and thread barriers.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np

TILE = 64  # rows: 128 columns x 64 rows of float32 are 32 kB


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _walk(weight, upper, scale, minimum, group_of, low, high, table, codes, first, last):  # type: ignore[no-untyped-def]
    """Decide the codes of rows first..last for all columns of `weight` (n_columns, n_rows); leave
    scaled errors in it.
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
                level = value[row] / (s if s != 0 else np.float32(1))
                best = 0
                for i in range(1, table.size):
                    if level > (table[i - 1] + table[i]) * np.float32(0.5):
                        best = i
                codes[column, first + row] = best
                errors[column, row] = (value[row] - table[best] * s) * inverse
    for column in range(n_columns):
        for row in range(n_rows):
            weight[column, first + row] = errors[column, row]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "gptq")


def sweep(
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
    n_rows = weight.shape[1]

    def work(first: int) -> None:
        last = min(first + TILE, n_rows)
        _walk(weight, upper, scale, minimum, group_of, low, high, table, codes, first, last)

    list(_pool().map(work, range(0, n_rows, TILE)))
