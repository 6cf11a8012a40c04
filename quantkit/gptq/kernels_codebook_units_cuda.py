"""The best codes of eight columns of some rows, as a Triton function.

`quantkit.gptq.codebook_units` says what is computed, and has the same in torch. What belongs to the
eight columns are tuples of eight tensors (rows,), so that sums over columns need no other lanes.
Imported only where tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from quantkit.ggml.codebook_units_cuda import shortlist
from quantkit.ggml.searches_cuda import tl, triton


@triton.jit
def multiplied(matrix, values, pitch: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return an (8, 8) matrix in memory, its rows `pitch` apart, times a tuple of eight."""
    found = ()
    for i in tl.static_range(8):
        total = tl.load(matrix + pitch * i) * values[0]
        for j in tl.static_range(1, 8):
            total += tl.load(matrix + pitch * i + j) * values[j]
        found = found + (total,)
    return found


@triton.jit
def _flipped(levels, slope, metric, which, good, pitch: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels and slope once the sign of column `which` is another, where that is `good`."""
    step = tl.zeros_like(slope[0])
    turned, moved = (), ()
    for i in tl.static_range(8):
        here = good & (which == i)
        step = tl.where(here, -2 * levels[i], step)
        turned = turned + (tl.where(here, -levels[i], levels[i]),)
    for i in tl.static_range(8):
        moved = moved + (slope[i] + step * tl.load(metric + pitch * which + i),)
    return turned, moved


@triton.jit
def _gains(levels, slope, metric, pitch: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each sign's flip alone adds to the cost."""
    found = ()
    for i in tl.static_range(8):
        gain = 4 * levels[i] * (levels[i] * tl.load(metric + (pitch + 1) * i) - slope[i])
        found = found + (gain,)
    return found


@triton.jit
def _best_flip(gains):  # type: ignore[no-untyped-def]
    best, which = gains[0], tl.zeros_like(gains[0]).to(tl.int32)
    for i in tl.static_range(1, 8):
        which = tl.where(gains[i] < best, i, which)
        best = tl.minimum(best, gains[i])
    return best, which


@triton.jit
def _signed(  # type: ignore[no-untyped-def]
    sizes,
    target,
    odd,
    metric,
    signs: tl.constexpr,
    n_rounds: tl.constexpr,
    pitch: tl.constexpr,
):
    """Sizes with signs that cost little by the whole metric, and that cost."""
    levels, off = (), ()
    for i in tl.static_range(8):
        own = sizes[i]
        if signs > 0:
            own = tl.where(target[i] < 0, -own, own)
        levels = levels + (own,)
        off = off + (own - target[i],)
    slope = multiplied(metric, off, pitch)
    cost = off[0] * slope[0]
    for i in tl.static_range(1, 8):
        cost += off[i] * slope[i]
    if signs == 2:
        best, which = _best_flip(_gains(levels, slope, metric, pitch))
        one_more = odd & (cost == cost)
        cost += tl.where(one_more, best, 0.0)
        levels, slope = _flipped(levels, slope, metric, which, one_more, pitch)
    if signs > 0:
        for _ in range(n_rounds):
            gains = _gains(levels, slope, metric, pitch)
            if signs == 1:
                best, which = _best_flip(gains)
                good = best < 0
                levels, slope = _flipped(levels, slope, metric, which, good, pitch)
            else:
                best = tl.zeros_like(cost)
                which = tl.zeros_like(cost).to(tl.int32)
                for i in tl.static_range(7):
                    for j in tl.static_range(i + 1, 8):
                        both = 8 * tl.load(metric + pitch * i + j) * levels[i] * levels[j]
                        pair = gains[i] + gains[j] + both
                        which = tl.where(pair < best, 8 * i + j, which)
                        best = tl.minimum(best, pair)
                good = best < 0
                levels, slope = _flipped(levels, slope, metric, which // 8, good, pitch)
                levels, slope = _flipped(levels, slope, metric, which % 8, good, pitch)
            cost += tl.minimum(best, 0.0)
    return levels, cost


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    target,
    half,
    metric,
    norms,
    columns,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    signs: tl.constexpr,
    n_listed: tl.constexpr,
    n_rounds: tl.constexpr,
    pitch: tl.constexpr,
):
    """Return signed levels near to the wanted ones `target`, both tuples of eight (rows,), and the
    one or two entries int32 (rows,).

    In memory are `metric` (8, 8), its rows `pitch` apart, `norms` (8 / width, n_table), by its
    diagonal, and the table, `columns` (width, n_table). `signs`: 0 in the entries, 1 free, 2 even.
    """
    is_even: tl.constexpr = signs == 2
    n: tl.constexpr = 8 if width == 4 and is_even else 4  # candidates
    n_negative = tl.zeros_like(half)
    share = ()
    for i in tl.static_range(8):
        size = target[i]
        if signs > 0:
            size = tl.abs(size)
            n_negative += (target[i] < 0).to(tl.int32)
        share = share + (2 * tl.load(metric + (pitch + 1) * i) * size,)
    odd = n_negative % 2 == 1
    wrong = tl.where(odd, 2.0, 0.0)
    if width == 8:
        found = shortlist(
            columns, norms, half, share, wrong, n_entries, n_table, 8, is_even, n_listed
        )
        one = tl.arange(0, n)[None, :]
        first = tl.where(one == 1, found[1][:, None], found[0][:, None])
        first = tl.where(one == 2, found[2][:, None], first)
        second = first
    else:
        left = (share[0], share[1], share[2], share[3])
        right = (share[4], share[5], share[6], share[7])
        own = norms + n_table
        a = shortlist(columns, norms, half, left, wrong, n_entries, n_table, 4, False, 2)
        b = shortlist(columns, own, half, right, wrong, n_entries, n_table, 4, False, 2)
        one = tl.arange(0, n)[None, :]
        first = tl.where(one % 4 < 2, a[0][:, None], a[1][:, None])
        second = tl.where(one % 2 == 0, b[0][:, None], b[1][:, None])
        if is_even:  # one half has the wrong sign, or none: then the lists are the same
            a = shortlist(columns, norms, half, left, wrong, n_entries, n_table, 4, True, 2)
            b = shortlist(columns, own, half, right, wrong, n_entries, n_table, 4, True, 2)
            other = tl.where(one % 4 < 2, a[0][:, None], a[1][:, None])
            first = tl.where(one >= 4, other, first)
            other = tl.where(one % 2 == 0, b[0][:, None], b[1][:, None])
            second = tl.where(one < 4, other, second)
    if n_table > n_entries:
        first += half[:, None] * n_entries
    sizes, wanted = (), ()
    for i in tl.static_range(8):
        entry = first if i < width else second
        sizes = sizes + (tl.load(columns + (i % width) * n_table + entry),)
        wanted = wanted + (target[i][:, None],)
    levels, cost = _signed(sizes, wanted, odd[:, None], metric, signs, n_rounds, pitch)
    least = tl.min(cost, 1)
    pick = tl.min(tl.where(cost == least[:, None], one, n), 1)
    here = one == pick[:, None]
    best = ()
    for i in tl.static_range(8):
        best = best + (tl.sum(tl.where(here, levels[i], 0.0), 1),)
    return best, tl.sum(tl.where(here, first, 0), 1), tl.sum(tl.where(here, second, 0), 1)
