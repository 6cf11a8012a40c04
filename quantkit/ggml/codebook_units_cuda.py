"""A short list of a codebook's entries for the eight columns of one row, as a Triton function.

All entries are ranked by a diagonal metric. A program of one warp ranks them for one row: a lane
owns every 32nd entry, all columns of it, and keeps the least cost that it saw. The best n entries
are among those of the n best lanes, which are ranked again. Imported only where tensors are on a
GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from quantkit.ggml.searches_cuda import tl, triton

LAST = tl.constexpr(0x7FFFFFFF)
LANES = tl.constexpr(32)


@triton.jit
def sortable(x):  # type: ignore[no-untyped-def]
    """Return int32 that order as float32 do: a GPU finds their minimum in one step."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _least(cost, index, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """The indices of the n least of costs, both (1, wide), the first of equal ones first: a tuple
    of three numbers, of which the first n count.
    """
    keys = sortable(cost)
    found = ()
    for i in tl.static_range(3):
        if i < n:
            least = tl.min(tl.min(keys, 1), 0)
            at = tl.min(tl.min(tl.where(keys == least, index, LAST), 1), 0)
            keys = tl.where(index == at, LAST, keys)
        found = found + (at,)
    return found


@triton.jit
def _costs(  # type: ignore[no-untyped-def]
    table, norms, at, share, wrong, width: tl.constexpr, is_even: tl.constexpr
):
    """Σ m (|t| - e)² less Σ m t² of entries `at` (1, wide), and that with what the cheapest wrong
    sign costs, times `wrong` / 2.
    """
    # One more axis than `share` has keeps its layout, columns along lanes, away from the table.
    values = tl.load(table + at[:, :, None] * width + tl.arange(0, width)[None, None, :])
    product = values.to(tl.float32) * share[:, None, :]
    cost = tl.load(norms + at) - tl.sum(product, 2)
    if is_even:
        return cost, cost + wrong * tl.min(product, 2)
    else:
        return cost, cost


@triton.jit
def _again(  # type: ignore[no-untyped-def]
    table,
    norms,
    share,
    wrong,
    least,
    members: tl.constexpr,
    width: tl.constexpr,
    is_even: tl.constexpr,
    n_listed: tl.constexpr,
):
    """The best entries of the lanes whose costs are `least`."""
    lanes = _least(least, tl.arange(0, LANES)[None, :], n_listed)
    enough: tl.constexpr = 4 * members if n_listed > 2 else 2 * members
    wide: tl.constexpr = max(enough, LANES)
    place = tl.arange(0, wide)[None, :]
    own = place // members
    at = tl.where(own == 1, lanes[1], lanes[0])
    if n_listed > 2:
        at = tl.where(own == 2, lanes[2], at)
    at += (place % members) * LANES
    _, cost = _costs(table, norms, at, share, wrong, width, is_even)
    return _least(tl.where(own < n_listed, cost, float("inf")), at, n_listed)


@triton.jit
def shortlist(  # type: ignore[no-untyped-def]
    table,
    norms,
    share,
    wrong,
    n_entries: tl.constexpr,
    width: tl.constexpr,
    is_even: tl.constexpr,
    n_listed: tl.constexpr,
):
    """Return the `n_listed` entries that cost least, and those that do without a wrong sign: a
    tuple of three numbers each, the rest of which mean nothing. Of entries of eight columns the
    second is the first.

    `table` float16 (n_entries, width) are the entries, `norms` (n_entries,) Σ m e² of each. `share`
    (1, width) is 2 m |t|. `wrong` is 2.0 where one sign is wrong, else 0.0.
    """
    members: tl.constexpr = n_entries // LANES
    both: tl.constexpr = is_even and width == 4
    plain = tl.full((1, LANES), float("inf"), tl.float32)
    least = plain
    for first in tl.range(0, n_entries, LANES, loop_unroll_factor=2):
        at = first + tl.arange(0, LANES)[None, :]
        one, cost = _costs(table, norms, at, share, wrong, width, is_even)
        least = tl.minimum(least, cost)
        if both:
            plain = tl.minimum(plain, one)
    found = _again(table, norms, share, wrong, least, members, width, is_even, n_listed)
    right = found
    if both:
        a, b = found[0], found[1]
        if wrong > 0:
            right = _again(table, norms, share, 0.0, plain, members, width, is_even, n_listed)
            a, b = right[0], right[1]
        right = (a, b, b)
    return found, right
