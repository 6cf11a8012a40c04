"""Values of rows in a codebook and their gradients, compiled by numba for a CPU.

A look over all entries of the table is what costs. So every unit of eight columns remembers where
it looked last, and how far it may move from there until another point can be the nearest: half of
what the second nearest was farther away. Until then nothing is looked up, and nothing changes.

`quantkit.tuning.units` says which points there are, and has the same in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from quantkit.ggml.codebooks import CODEBOOKS, UNIT, Codebook
from quantkit.ggml.types import QuantType
from quantkit.gptq.compiled import numba, over_rows
from quantkit.gptq.kernels_codebook_units import FAST, costs

_SAFE = np.float32(0.999)  # of a way, for what float32 rounds
_TILE = 16  # rows that a thread takes at once


class Table(NamedTuple):
    """What the kernels need of a codebook."""

    columns: np.ndarray  # float32 (width, n_entries)
    norms: np.ndarray  # float32 (n_entries,): squared lengths
    signs: int  # 0: in the entries, 1: free, 2: an even number is negative
    group: int  # columns that share a scale
    n_allowed: int  # entries of one half of the table, or of all of it


class Places(NamedTuple):
    """Where the units of some rows are: what was nearest to each when it was looked up."""

    entry: np.ndarray  # int16 (n_rows, n_columns / width)
    signs: np.ndarray  # uint8 (n_rows, n_units)
    lowest: np.ndarray  # int16 (n_rows, n_groups): the first entry that a group may use
    seen: np.ndarray  # float32 (n_rows, n_columns): the level at that time
    reach: np.ndarray  # float32 (n_rows, n_units): squared, how far it may move


def places(book: Codebook, shape: Sequence[int], half: torch.Tensor) -> Places:
    """Return places of rows (n_rows, n_columns) that have not been looked up; `half`, int64
    (n_rows, n_groups), is the half of the table that a group may use.
    """
    n_rows, n_columns = shape
    return Places(
        np.zeros((n_rows, n_columns // book.width), np.int16),
        np.zeros((n_rows, n_columns // UNIT), np.uint8),
        (half * (len(book.entries) // 2)).to(torch.int16).numpy(),
        np.zeros((n_rows, n_columns), np.float32),
        np.full((n_rows, n_columns // UNIT), -1, np.float32),
    )


@cache
def _table(qtype: QuantType) -> Table:
    book = CODEBOOKS[qtype]
    return Table(
        np.ascontiguousarray(book.entries.T),
        np.square(book.entries).sum(1),
        book.sign_kind,
        book.group,
        len(book.entries) // (2 if book.halves else 1),
    )


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _rank(table, twice, at, odd, low, high, cost):  # type: ignore[no-untyped-def]
    """The squared distances of entries low..high to some of the sizes, of which `twice` is twice,
    less those sizes' own, where `odd` with the least that one wrong sign adds; return the nearest,
    its cost and that of the second.
    """
    costs(table.columns, table.norms, twice, at, odd, low, high, cost)
    best, first, second = low, np.float32(np.inf), np.float32(np.inf)
    for k in range(low, high):
        own = cost[k]
        if own < second:
            if own < first:
                best, first, second = k, own, first
            else:
                second = own
    return best, first, second


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _flips(table, sizes, at, entry, by_flip):  # type: ignore[no-untyped-def]
    """What each wrong sign of an entry adds to its squared distance, written from `at` on."""
    for i in range(len(table.columns)):
        by_flip[at + i] = 4 * sizes[at + i] * table.columns[i, entry]


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _two_least(values, start, end):  # type: ignore[no-untyped-def]
    """Where the least value is, it, and the second."""
    where, first, second = start, np.float32(np.inf), np.float32(np.inf)
    for i in range(start, end):
        if values[i] < first:
            where, first, second = i, values[i], first
        elif values[i] < second:
            second = values[i]
    return where, first, second


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _look_up(table, target, low, high, sizes, twice, by_flip, cost):  # type: ignore[no-untyped-def]
    """The entries (the second 0 where a unit has one) and the byte of signs of the point nearest
    to `target`, and the squared half of what the second nearest is farther away.
    """
    width, byte, is_odd = len(table.columns), 0, False
    own = np.float32(0)
    for i in range(8):
        own += target[i] * target[i]
        sizes[i] = target[i]
        if table.signs > 0 and target[i] < 0:
            sizes[i] = -target[i]
            byte |= 1 << i
            is_odd = not is_odd
        twice[i] = 2 * sizes[i]
    is_odd = is_odd and table.signs == 2
    one, other = 0, 0
    if width == 8:
        one, nearest, second = _rank(table, twice, 0, is_odd, low, high, cost)
        _flips(table, sizes, 0, one, by_flip)
    else:
        one, nearest, second = _rank(table, twice, 0, False, low, high, cost)
        other, nearest1, second1 = _rank(table, twice, 4, False, low, high, cost)
        if is_odd:  # one of the halves has the wrong sign
            odd0, wrong0, third0 = _rank(table, twice, 0, True, low, high, cost)
            odd1, wrong1, third1 = _rank(table, twice, 4, True, low, high, cost)
            first, last = wrong0 + nearest1, nearest + wrong1
            # The same entry with its next cheapest wrong sign may be the second of a half.
            _flips(table, sizes, 0, odd0, by_flip)
            _, least, next_ = _two_least(by_flip, 0, 4)
            third0 = min(third0, wrong0 - least + next_)
            _flips(table, sizes, 4, odd1, by_flip)
            _, least, next_ = _two_least(by_flip, 4, 8)
            third1 = min(third1, wrong1 - least + next_)
            of_first = min(third0 + nearest1, wrong0 + second1)
            of_last = min(third1 + nearest, wrong1 + second)
            if first <= last:
                one, nearest, second = odd0, first, min(of_first, last)
                start, end = 0, 4
            else:
                other, nearest, second = odd1, last, min(of_last, first)
                start, end = 4, 8
            _flips(table, sizes, start, one if start == 0 else other, by_flip)
            which, _, _ = _two_least(by_flip, start, end)
            byte ^= 1 << which
        else:
            second = min(second + nearest1, nearest + second1)
            nearest = nearest + nearest1
            _flips(table, sizes, 0, one, by_flip)
            _flips(table, sizes, 4, other, by_flip)
    if table.signs == 2 and is_odd and width == 8:
        which, least, next_ = _two_least(by_flip, 0, 8)
        second = min(second, nearest - least + next_)
        byte ^= 1 << which
    elif table.signs == 2 and not is_odd:
        _, least, next_ = _two_least(by_flip, 0, 8)
        second = min(second, nearest + least + next_)
    elif table.signs == 1:
        _, least, _ = _two_least(by_flip, 0, 8)
        second = min(second, nearest + least)
    near = np.sqrt(max(np.float32(0), nearest + own))
    far = np.sqrt(max(np.float32(0), second + own))
    half = max(np.float32(0), _SAFE * (far - near) / 2)
    return one, other, byte, half * half


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _value_rows(table, places, level, unit, scale, out, first, last):  # type: ignore[no-untyped-def]
    width, n_columns = len(table.columns), level.shape[1]
    cost = np.zeros(len(table.norms), np.float32)
    sizes, twice = np.zeros(8, np.float32), np.zeros(8, np.float32)
    target, by_flip = np.zeros(8, np.float32), np.zeros(8, np.float32)
    for row in range(first, last):
        for k in range(n_columns // 8):
            at = 8 * k
            moved = np.float32(0)
            for i in range(8):
                step = (level[row, at + i] - places.seen[row, at + i]) * unit
                moved += step * step
            if not moved < places.reach[row, k]:
                low = places.lowest[row, at // table.group]
                for i in range(8):
                    places.seen[row, at + i] = level[row, at + i]
                    target[i] = level[row, at + i] * unit
                one, other, byte, reach = _look_up(
                    table, target, low, low + table.n_allowed, sizes, twice, by_flip, cost
                )
                places.reach[row, k] = reach
                places.signs[row, k] = byte
                places.entry[row, at // width] = one
                if width == 4:
                    places.entry[row, at // width + 1] = other
            own, byte = scale[row, at // table.group], places.signs[row, k]
            for i in range(8):
                size = table.columns[i % width, places.entry[row, (at + i) // width]]
                out[row, at + i] = own * (-size if byte >> i & 1 else size)


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _gradient_rows(  # type: ignore[no-untyped-def]
    pull, level, values, scale, unit, bound, to_level, along, first, last
):
    group = level.shape[1] // scale.shape[1]
    for row in range(first, last):
        for g in range(scale.shape[1]):
            own, total = scale[row, g] * unit, np.float32(0)
            for at in range(g * group, (g + 1) * group):
                given, at_level = pull[row, at], level[row, at]
                total += given * values[row, at]
                is_out = abs(at_level) > bound and given * at_level * own < 0
                to_level[row, at] = np.float32(0) if is_out else given * own
            along[row, g] = total


def values(
    book: Codebook,
    places: Places,
    level: np.ndarray,
    unit: float,
    scale: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out`, float32 (n_rows, n_columns), with the values of the points nearest to `level`,
    of that shape and in steps of `unit`; `scale` is float32 (n_rows, n_groups). `places` keep up.
    """
    table = _table(book.qtype)

    def work(first: int, last: int) -> None:
        _value_rows(table, places, level, np.float32(unit), scale, out, first, last)

    over_rows(len(level), _TILE, work)


def gradients(
    unit: float,
    bound: float,
    pull: np.ndarray,
    level: np.ndarray,
    values: np.ndarray,
    scale: np.ndarray,
    to_level: np.ndarray,
    along: np.ndarray,
) -> None:
    """Fill `to_level`, float32 (n_rows, n_columns), with the gradient by `level`, which does not
    pull further out of `bound`, and `along`, float32 (n_rows, n_groups), with the sums of the
    gradient by `values`, `pull`, times them.
    """

    def work(first: int, last: int) -> None:
        arguments = pull, level, values, scale, np.float32(unit), np.float32(bound)
        _gradient_rows(*arguments, to_level, along, first, last)

    over_rows(len(level), _TILE, work)
