"""A short list of a codebook's entries for eight columns of some rows, as a Triton function.

All entries are ranked by a diagonal metric. A program ranks them for a few rows at once, entries
along its lanes. Only the least cost of every few entries is kept at first: the best n entries lie
in the n best of those sets, whose members are ranked again. Imported only where tensors are on a
GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from quantkit.ggml.searches_cuda import tl, triton

LAST = tl.constexpr(0x7FFFFFFF)
MEMBERS = tl.constexpr(8)  # entries of a set


@triton.jit
def sortable(x):  # type: ignore[no-untyped-def]
    """Return int32 that order as float32 do: a GPU finds their minimum in one step."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _least(keys, index, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """The indices of the n least of every row, the first of equal ones first: n of (rows,)."""
    found = ()
    for _ in tl.static_range(n):
        least = tl.min(keys, 1)
        at = tl.min(tl.where(keys == least[:, None], index, LAST), 1)
        keys = tl.where(index == at[:, None], LAST, keys)
        found = found + (at,)
    return found


@triton.jit
def _cost(  # type: ignore[no-untyped-def]
    columns,
    norms,
    at,
    half,
    share,
    wrong,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    is_even: tl.constexpr,
):
    """Σ m (|t| - e)² less Σ m t² of entries `at` (1 or rows, n); with what the cheapest wrong sign
    costs, times `wrong` / 2.
    """
    cost = tl.load(norms + at)
    if n_table > n_entries:
        cost = tl.where(half[:, None] == 1, tl.load(norms + n_entries + at), cost)
    least = cost
    for i in tl.static_range(width):
        value = tl.load(columns + i * n_table + at)
        if is_even:
            product = share[i][:, None] * value
            cost = cost - product
            if i == 0:
                least = product
            else:
                least = tl.minimum(least, product)
        else:
            cost = cost - share[i][:, None] * value
    if is_even:
        cost += wrong[:, None] * least
    return cost


@triton.jit
def shortlist(  # type: ignore[no-untyped-def]
    columns,
    norms,
    half,
    share,
    wrong,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    is_even: tl.constexpr,
    n_listed: tl.constexpr,
):
    """Return the `n_listed` entries of every row that cost least, a tuple of int32 (rows,).

    `columns` float32 (width, n_table) are the entries, `norms` (n_table,) Σ m e² of each. `share`
    is a tuple of `width` times (rows,): 2 m |t|. `wrong` (rows,) is 2 where one sign is wrong, else
    0. Of a table of two halves, those of n_entries, `half` (rows,) says which; indices are within.
    """
    rows: tl.constexpr = half.shape[0]
    span: tl.constexpr = n_entries // MEMBERS
    index = tl.arange(0, span)[None, :]
    least = tl.full((rows, span), float("inf"), tl.float32)
    for first in range(0, n_entries, span):
        cost = _cost(
            columns + first,
            norms + first,
            index,
            half,
            share,
            wrong,
            n_entries,
            n_table,
            width,
            is_even,
        )
        least = tl.minimum(least, cost)
    sets = _least(sortable(least), index, n_listed)
    wide: tl.constexpr = 32 if n_listed > 2 else 16
    place = tl.arange(0, wide)[None, :]
    own = place // MEMBERS
    at = sets[0][:, None] + (place % MEMBERS) * span
    for i in tl.static_range(1, n_listed):
        at = tl.where(own == i, sets[i][:, None] + (place % MEMBERS) * span, at)
    cost = _cost(columns, norms, at, half, share, wrong, n_entries, n_table, width, is_even)
    return _least(tl.where(own < n_listed, sortable(cost), LAST), at, n_listed)
