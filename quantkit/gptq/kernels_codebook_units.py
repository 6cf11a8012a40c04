"""The best codes of eight columns of one row, compiled by numba for a CPU.

`quantkit.gptq.codebook_units` says what is computed, and has the same in torch. What is costly is
the look over all entries of the table: it runs along them, so that they fill vector registers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantkit.gptq.compiled import numba

FAST = {"contract", "reassoc", "nsz"}  # never nnan: rows may hold anything


class Book(NamedTuple):
    """What the kernels need of a codebook."""

    entries: np.ndarray  # float32 (n_entries, width)
    columns: np.ndarray  # the same transposed, contiguous
    signs: int  # 0: in the entries, 1: free, 2: an even number is negative
    group: int
    multipliers: np.ndarray  # float32
    halves: int  # 1 where the units of a group share a half of the table
    n_listed: int  # entries that are compared by the whole metric, of each half of a unit
    n_rounds: int  # of sign flips
    least_step: np.float32  # of an integer: a scale that is nearer to the best is not changed


class Scratch(NamedTuple):
    cost: np.ndarray
    listed: np.ndarray
    listed_cost: np.ndarray
    trial: np.ndarray
    slope: np.ndarray
    best: np.ndarray
    share: np.ndarray


@numba.njit(nogil=True, cache=True)
def make_scratch(book):  # type: ignore[no-untyped-def]
    return Scratch(
        np.zeros(len(book.entries), np.float32),
        np.zeros((2, 2 * book.n_listed), np.int32),
        np.zeros(book.n_listed + 1, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
    )


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def add_norms(book, metric, norms):  # type: ignore[no-untyped-def]
    """Σ m e² of every entry by the metric's diagonal: (8 / width, n_entries)."""
    width, n = book.columns.shape
    norms[:] = 0
    for part in range(8 // width):
        for i in range(width):
            m = metric[part * width + i, part * width + i]
            for k in range(n):
                norms[part, k] += m * book.columns[i, k] * book.columns[i, k]


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def costs(columns, norms, share, at, odd, low, high, cost):  # type: ignore[no-untyped-def]
    """Σ m (|t| - e)² less Σ m t² of entries low..high, with `share` = 2 m |t|; where the signs are
    `odd`, with the least that one wrong sign costs.
    """
    if columns.shape[0] == 8:
        c0, c1, c2, c3 = columns[0], columns[1], columns[2], columns[3]
        c4, c5, c6, c7 = columns[4], columns[5], columns[6], columns[7]
        s0, s1, s2, s3 = share[0], share[1], share[2], share[3]
        s4, s5, s6, s7 = share[4], share[5], share[6], share[7]
        if odd:
            for k in range(low, high):
                p0, p1, p2, p3 = s0 * c0[k], s1 * c1[k], s2 * c2[k], s3 * c3[k]
                p4, p5, p6, p7 = s4 * c4[k], s5 * c5[k], s6 * c6[k], s7 * c7[k]
                least = min(min(min(p0, p1), min(p2, p3)), min(min(p4, p5), min(p6, p7)))
                cost[k] = norms[k] - (((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))) + 2 * least
        else:
            for k in range(low, high):
                one = (s0 * c0[k] + s1 * c1[k]) + (s2 * c2[k] + s3 * c3[k])
                other = (s4 * c4[k] + s5 * c5[k]) + (s6 * c6[k] + s7 * c7[k])
                cost[k] = norms[k] - (one + other)
    else:
        c0, c1, c2, c3 = columns[0], columns[1], columns[2], columns[3]
        s0, s1, s2, s3 = share[at], share[at + 1], share[at + 2], share[at + 3]
        if odd:
            for k in range(low, high):
                p0, p1, p2, p3 = s0 * c0[k], s1 * c1[k], s2 * c2[k], s3 * c3[k]
                least = min(min(p0, p1), min(p2, p3))
                cost[k] = norms[k] - ((p0 + p1) + (p2 + p3)) + 2 * least
        else:
            for k in range(low, high):
                cost[k] = norms[k] - ((s0 * c0[k] + s1 * c1[k]) + (s2 * c2[k] + s3 * c3[k]))


@numba.njit(nogil=True, cache=True)
def _least(cost, low, high, n, listed, listed_cost):  # type: ignore[no-untyped-def]
    """Fill `listed` with the n entries of low..high that cost least, the first of equal ones
    first.
    """
    n = min(n, high - low)
    for i in range(n):
        listed_cost[i] = np.inf
    worst = listed_cost[n - 1]
    for k in range(low, high):
        own = cost[k]
        if own < worst:
            i = n - 1
            while i > 0 and listed_cost[i - 1] > own:
                listed_cost[i] = listed_cost[i - 1]
                listed[i] = listed[i - 1]
                i -= 1
            listed_cost[i] = own
            listed[i] = k
            worst = listed_cost[n - 1]
    return n


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _flip(trial, slope, metric, i):  # type: ignore[no-untyped-def]
    step = -2 * trial[i]
    trial[i] = -trial[i]
    for j in range(8):
        slope[j] += metric[i, j] * step


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _signed(trial, target, metric, signs, n_rounds, slope):  # type: ignore[no-untyped-def]
    """Give the sizes `trial` signs that cost little by the whole metric; return the cost."""
    odd = 0
    if signs > 0:
        for i in range(8):
            if target[i] < 0:
                trial[i] = -trial[i]
                odd ^= 1
    cost = np.float32(0)
    for i in range(8):
        inner = np.float32(0)
        for j in range(8):
            inner += metric[i, j] * (trial[j] - target[j])
        slope[i] = inner
        cost += inner * (trial[i] - target[i])
    if signs == 0:
        return cost
    if signs == 2 and odd:
        best, which = np.float32(np.inf), 0
        for i in range(8):
            gain = 4 * trial[i] * (trial[i] * metric[i, i] - slope[i])
            if gain < best:
                best, which = gain, i
        cost += best
        _flip(trial, slope, metric, which)
    for _ in range(n_rounds):
        best, one, other = np.float32(0), -1, -1
        if signs == 1:
            for i in range(8):
                gain = 4 * trial[i] * (trial[i] * metric[i, i] - slope[i])
                if gain < best:
                    best, one = gain, i
        else:
            for i in range(7):
                first = 4 * trial[i] * (trial[i] * metric[i, i] - slope[i])
                for j in range(i + 1, 8):
                    gain = first + 4 * trial[j] * (trial[j] * metric[j, j] - slope[j])
                    gain += 8 * trial[i] * trial[j] * metric[i, j]
                    if gain < best:
                        best, one, other = gain, i, j
        if one < 0:
            break
        cost += best
        _flip(trial, slope, metric, one)
        if other >= 0:
            _flip(trial, slope, metric, other)
    return cost


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def choose(book, norms, metric, target, low, high, scratch):  # type: ignore[no-untyped-def]
    """Return the entries (the second -1 where a unit has one) for a unit whose wanted levels are
    `target` (8,); their signed levels are left in `scratch.best`.
    """
    width = book.columns.shape[0]
    trial, slope, best_levels, listed = scratch.trial, scratch.slope, scratch.best, scratch.listed
    odd = False
    for i in range(8):
        size = target[i]
        if book.signs > 0 and size < 0:
            size = -size
            odd = not odd
        scratch.share[i] = 2 * metric[i, i] * size
    odd = odd and book.signs == 2
    counts0 = counts1 = 0
    for part in range(8 // width):
        own, cost, at = norms[part], scratch.cost, part * width
        costs(book.columns, own, scratch.share, at, False, low, high, cost)
        if width == 8 and odd:
            costs(book.columns, own, scratch.share, at, True, low, high, cost)
        n = _least(cost, low, high, book.n_listed, listed[part], scratch.listed_cost)
        if width == 4 and odd:  # either half may have the wrong sign
            costs(book.columns, own, scratch.share, at, True, low, high, cost)
            n += _least(cost, low, high, book.n_listed, listed[part, n:], scratch.listed_cost)
        if part == 0:
            counts0 = n
        else:
            counts1 = n
    best, first, second = np.float32(np.inf), low, -1 if width == 8 else low
    for a in range(counts0):
        for b in range(max(1, counts1)):
            if width == 4 and odd and (a < book.n_listed) == (b < book.n_listed):
                continue  # one half has the wrong sign
            for i in range(width):
                trial[i] = book.entries[listed[0, a], i]
            if width == 4:
                for i in range(4):
                    trial[4 + i] = book.entries[listed[1, b], i]
            cost = _signed(trial, target, metric, book.signs, book.n_rounds, slope)
            if cost < best:
                best, first = cost, listed[0, a]
                second = listed[1, b] if width == 4 else -1
                for i in range(8):
                    best_levels[i] = trial[i]
    return first, second


@numba.njit(nogil=True, cache=True)
def sign_byte(levels, signs):  # type: ignore[no-untyped-def]
    found = 0
    if signs > 0:
        for i in range(8):
            if levels[i] < 0:
                found |= 1 << i
    return found
