"""The best codes of the eight columns of one row, as a Triton function.

`quantkit.gptq.codebook_units` says what is computed, and has the same in torch. A program is one
warp, and what belongs to eight columns is a tensor (8,), of candidates (n, 8): small code, compiled
in seconds. Imported only where tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from quantkit.ggml.codebook_units_cuda import shortlist
from quantkit.ggml.searches_cuda import tl, triton


@triton.jit
def lane(values, j: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return column j of (n, 8) for all columns: lanes ask one another."""
    return tl.gather(values, tl.full(values.shape, j, tl.int32), 1)


@triton.jit
def lines_of(matrix, pitch: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the lines of a matrix in memory, `pitch` apart: a tuple of eight (1, 8)."""
    lines = ()
    for j in tl.static_range(8):
        lines = lines + (tl.load(matrix + pitch * j + tl.arange(0, 8)[None, :]),)
    return lines


@triton.jit
def multiplied(values, lines):  # type: ignore[no-untyped-def]
    """Return values (n, 8) times the matrix of these lines."""
    total = lane(values, 0) * lines[0]
    for j in tl.static_range(1, 8):
        total += lane(values, j) * lines[j]
    return total


@triton.jit
def _candidates(  # type: ignore[no-untyped-def]
    table,
    norms,
    share,
    odd,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    is_even: tl.constexpr,
    n_listed: tl.constexpr,
):
    """Entries to compare, int32 (4 or 8, 8): that of every column."""
    n: tl.constexpr = 8 if width == 4 and is_even else 4
    one = tl.arange(0, n)[:, None]
    column = tl.arange(0, 8)[None, :]
    wrong = 2.0 * odd
    if width == 8:
        found, _ = shortlist(table, norms, share, wrong, n_entries, 8, is_even, n_listed)
        entry = tl.where(one == 1, found[1], tl.where(one == 2, found[2], found[0]))
        return entry + tl.zeros_like(column)
    else:
        parts = share.reshape(2, 4)
        first = (tl.arange(0, 2) == 0)[:, None]
        left = tl.sum(tl.where(first, parts, 0.0), 0)[None, :]
        right = tl.sum(tl.where(first, 0.0, parts), 0)[None, :]
        own = norms + n_table
        bad_left, left = shortlist(table, norms, left, wrong, n_entries, 4, is_even, n_listed)
        bad_right, right = shortlist(table, own, right, wrong, n_entries, 4, is_even, n_listed)
        # One half has the wrong sign, or none: then the lists are the same.
        of_left = tl.where(one % 4 < 2, left[0], left[1])
        of_right = tl.where(one % 2 == 0, right[0], right[1])
        if is_even:
            other = tl.where(one % 4 < 2, bad_left[0], bad_left[1])
            of_left = tl.where(one >= 4, other, of_left)
            other = tl.where(one % 2 == 0, bad_right[0], bad_right[1])
            of_right = tl.where(one < 4, other, of_right)
        return tl.where(column < 4, of_left, of_right)


@triton.jit
def _cheapest(gains):  # type: ignore[no-untyped-def]
    """The least of every row (n, 8), and its column."""
    best = tl.min(gains, 1)
    return best, tl.min(tl.where(gains == best[:, None], tl.arange(0, 8)[None, :], 7), 1)


@triton.jit
def _cheapest_pair(gains, levels, lines):  # type: ignore[no-untyped-def]
    """What the best flip of two columns adds to the cost, and both."""
    column = tl.arange(0, 8)[None, :]
    best = tl.full(gains.shape, float("inf"), tl.float32)
    at = tl.zeros(gains.shape, tl.int32)
    for j in tl.static_range(1, 8):
        pair = gains + lane(gains, j) + 8 * levels * lines[j] * lane(levels, j)
        better = (column < j) & (pair < best)
        best = tl.where(better, pair, best)
        at = tl.where(better, 8 * column + j, at)
    least = tl.min(best, 1)
    at = tl.min(tl.where(best == least[:, None], at, 63), 1)
    return least, at // 8, at % 8


@triton.jit
def _signed(  # type: ignore[no-untyped-def]
    sizes, target, odd, lines, diagonal, signs: tl.constexpr, n_rounds: tl.constexpr
):
    """Sizes (n, 8) with signs that cost little by the whole metric, and that cost (n,)."""
    column = tl.arange(0, 8)[None, :]
    levels = sizes
    if signs > 0:
        levels = tl.where(target < 0, -sizes, sizes)
    off = levels - target
    slope = multiplied(off, lines)
    cost = tl.sum(off * slope, 1)
    if signs > 0:
        # Where one even sign is wrong, the first round flips one column, whatever it costs.
        going = 1
        for turn in range(signs - 1 - odd, n_rounds + signs - 1):
            if going == 1:
                gains = 4 * levels * (levels * diagonal - slope)
                if signs == 1:
                    best, one = _cheapest(gains)
                    other, good = one, best < 0
                elif turn == 0:
                    best, one = _cheapest(gains)
                    other, good = one, one >= 0
                else:
                    best, one, other = _cheapest_pair(gains, levels, lines)
                    good = best < 0
                here = good[:, None] & ((column == one[:, None]) | (column == other[:, None]))
                step = tl.where(here, -2 * levels, 0.0)
                levels += step
                slope += multiplied(step, lines)
                cost += tl.where(good, best, 0.0)
                going = tl.max(good.to(tl.int32), 0)
    return levels, cost


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    target,
    half,
    lines,
    diagonal,
    norms,
    table,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    signs: tl.constexpr,
    n_listed: tl.constexpr,
    n_rounds: tl.constexpr,
):
    """Return signed levels near to the wanted ones `target`, both (1, 8), and the entry of every
    column, int32 (1, 8). Of a table of two halves, those of n_entries, `half` says which.

    `lines` are those of the metric, `diagonal` (1, 8) its own. In memory are `norms` (8 / width,
    n_table), by the diagonal, and the table, float16 (n_table, width). `signs`: 0 in the entries, 1
    free, 2 even.
    """
    size = target
    odd = 0
    if signs > 0:
        size = tl.abs(target)
        odd = tl.sum(tl.sum((target < 0).to(tl.int32), 1), 0) % 2
    # The halves of a table differ by a constant, so that the rank of products is that of either.
    shift = half * n_entries
    entry = _candidates(
        table,
        norms + shift,
        2 * diagonal * size,
        odd,
        n_entries,
        n_table,
        width,
        signs == 2,
        n_listed,
    )
    entry += shift
    sizes = tl.load(table + entry * width + (tl.arange(0, 8) % width)[None, :]).to(tl.float32)
    levels, cost = _signed(sizes, target, odd, lines, diagonal, signs, n_rounds)
    n: tl.constexpr = cost.shape[0]
    one = tl.arange(0, n)
    pick = tl.min(tl.where(cost == tl.min(cost, 0), one, n), 0)
    here = (one == pick)[:, None]
    return (
        tl.sum(tl.where(here, levels, 0.0), 0)[None, :],
        tl.sum(tl.where(here, entry, 0), 0)[None, :],
    )
