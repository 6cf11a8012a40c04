"""Values of rows in a codebook and their gradients on an NVIDIA GPU, in Triton.

A program owns some units of eight columns and walks over all entries of the table, which every
program finds in the cache; nothing but levels and what is chosen passes memory.
`quantkit.tuning.units` is the reference. Imported only where tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from functools import cache

import torch

from quantkit.ggml.codebooks import CODEBOOKS, UNIT, Codebook
from quantkit.ggml.searches_cuda import tl, triton
from quantkit.ggml.types import QuantType
from quantkit.tuning.units import Points

_UNITS = 256  # of a program: two for each thread share what is read of the table
_WEIGHTS = 2048  # of a program that sums gradients, whole groups


@triton.jit
def _rank(  # type: ignore[no-untyped-def]
    table, norms, sizes, n_entries, width: tl.constexpr, with_wrong: tl.constexpr
):
    """The least squared distances to `sizes`, a tuple of `width` times (units,), less the sizes'
    own, and the entries that have them; then the same with one wrong sign.
    """
    best = tl.full(sizes[0].shape, float("inf"), tl.float32)
    at = tl.zeros(sizes[0].shape, tl.int32)
    best_wrong, at_wrong = best, at
    for k in range(n_entries):
        cost = tl.zeros(sizes[0].shape, tl.float32) + tl.load(norms + k)
        least = cost
        for i in tl.static_range(width):
            product = 2 * sizes[i] * tl.load(table + k * width + i)
            cost -= product
            if i == 0:
                least = product
            else:
                least = tl.minimum(least, product)
        good = cost < best
        best, at = tl.where(good, cost, best), tl.where(good, k, at)
        if with_wrong:
            cost += 2 * least
            good = cost < best_wrong
            best_wrong = tl.where(good, cost, best_wrong)
            at_wrong = tl.where(good, k, at_wrong)
    return best, at, best_wrong, at_wrong


@triton.jit
def _cheapest_sign(table, entry, sizes, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bit of the column whose wrong sign costs least."""
    least = sizes[0] * tl.load(table + entry * width)
    bit = tl.full(least.shape, 1, tl.int32)
    for i in tl.static_range(1, width):
        product = sizes[i] * tl.load(table + entry * width + i)
        good = product < least
        least, bit = tl.where(good, product, least), tl.where(good, 1 << i, bit)
    return bit


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    level,
    half,
    scale,
    table,
    norms,
    entry,
    signs,
    out,
    n_units,
    unit,
    shift,
    n_entries,
    group: tl.constexpr,
    width: tl.constexpr,
    has_signs: tl.constexpr,
    are_even: tl.constexpr,
    halves: tl.constexpr,
    tile: tl.constexpr,
):
    units = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = units < n_units
    groups = units // (group // 8)
    lower = tl.zeros((tile,), tl.int32)
    if halves:  # the second half is the first, moved: so the target is moved back
        lower = tl.load(half + groups, mask=inside, other=0).to(tl.int32)
    byte = tl.zeros((tile,), tl.int32)
    n_negative = tl.zeros((tile,), tl.int32)
    first = ()
    last = ()
    for i in tl.static_range(8):
        target = tl.load(level + 8 * units + i, mask=inside, other=0.0) * unit
        size = target
        if has_signs:
            negative = (target < 0).to(tl.int32)
            byte += negative << i
            n_negative += negative
            size = tl.abs(target)
        if halves:
            size += shift * lower
        if i < width:
            first = first + (size,)
        else:
            last = last + (size,)
    odd = n_negative % 2 == 1
    best, at, best_wrong, at_wrong = _rank(table, norms, first, n_entries, width, are_even)
    other = at
    if width == 4:
        best1, other, best_wrong1, at_wrong1 = _rank(table, norms, last, n_entries, width, are_even)
        if are_even:
            is_first = best_wrong - best <= best_wrong1 - best1
            at = tl.where(odd & is_first, at_wrong, at)
            other = tl.where(odd & (is_first == 0), at_wrong1, other)
            bit = tl.where(
                is_first,
                _cheapest_sign(table, at, first, width),
                _cheapest_sign(table, other, last, width) << 4,
            )
            byte ^= tl.where(odd, bit, 0)
        tl.store(entry + 2 * units, at.to(tl.int16), mask=inside)
        tl.store(entry + 2 * units + 1, other.to(tl.int16), mask=inside)
    else:
        if are_even:
            at = tl.where(odd, at_wrong, at)
            byte ^= tl.where(odd, _cheapest_sign(table, at, first, width), 0)
        if halves:
            at += lower * n_entries
        tl.store(entry + units, at.to(tl.int16), mask=inside)
    tl.store(signs + units, byte.to(tl.uint8), mask=inside)
    scales = tl.load(scale + groups, mask=inside, other=0.0)
    for i in tl.static_range(8):
        if i < width:
            size = tl.load(table + at * width + i)
        else:
            size = tl.load(table + other * width + i - width)
        size = tl.where((byte >> i) & 1 == 1, -size, size)
        tl.store(out + 8 * units + i, size * scales, mask=inside)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    pull,
    level,
    values,
    scale,
    to_level,
    along,
    n_groups,
    unit,
    bound,
    group: tl.constexpr,
    tile: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = groups < n_groups
    at = groups[:, None] * group + tl.arange(0, group)[None, :]
    given = tl.load(pull + at, mask=inside[:, None], other=0.0)
    own = tl.load(level + at, mask=inside[:, None], other=0.0)
    steps = tl.load(scale + groups, mask=inside, other=0.0)[:, None] * unit
    is_out = (tl.abs(own) > bound) & (given * own * steps < 0)
    tl.store(to_level + at, tl.where(is_out, 0.0, given * steps), mask=inside[:, None])
    value = tl.load(values + at, mask=inside[:, None], other=0.0)
    tl.store(along + groups, tl.sum(given * value, 1), mask=inside)


def values(
    book: Codebook, level: torch.Tensor, unit: float, half: torch.Tensor, scale: torch.Tensor
) -> tuple[Points, torch.Tensor]:
    """Return the points nearest to `level`, float32 (n_rows, n_columns) in steps of `unit`, and
    the values with them, of that shape. `half`, int64 (n_rows, n_groups), is the half of the table
    that a group may use; `scale` is float32 of that shape.
    """
    level = level.contiguous()
    n_rows, n_columns = level.shape
    entry = level.new_empty((n_rows, n_columns // book.width), dtype=torch.int16)
    signs = level.new_empty((n_rows, n_columns // UNIT), dtype=torch.uint8)
    out = torch.empty_like(level)
    table, norms = _table(book.qtype, level.device)
    n_entries = len(table) // (2 if book.halves else 1)
    n_units = signs.numel()
    with torch.cuda.device_of(level):
        _values[(triton.cdiv(n_units, _UNITS),)](
            level,
            half.contiguous(),
            scale.contiguous(),
            table,
            norms,
            entry,
            signs,
            out,
            n_units,
            unit,
            float(book.entries[0, 0] - book.entries[n_entries % len(table), 0]),
            n_entries,
            group=book.group,
            width=book.width,
            has_signs=book.has_signs,
            are_even=book.signs_are_even,
            halves=book.halves,
            tile=_UNITS,
        )
    return Points(entry, signs), out


def gradients(
    unit: float,
    bound: float,
    pull: torch.Tensor,
    level: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    to_level: torch.Tensor,
    along: torch.Tensor,
) -> None:
    """Fill `to_level`, float32 (n_rows, n_columns), with the gradient by `level`, which does not
    pull further out of `bound`, and `along`, float32 (n_rows, n_groups), with the sums of the
    gradient by `values`, `pull`, times them. All are contiguous.
    """
    n_groups = scale.numel()
    group = level.numel() // n_groups
    tile = _WEIGHTS // group
    with torch.cuda.device_of(level):
        _gradients[(triton.cdiv(n_groups, tile),)](
            pull,
            level,
            values,
            scale,
            to_level,
            along,
            n_groups,
            unit,
            bound,
            group=group,
            tile=tile,
        )


@cache
def _table(qtype: QuantType, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries, float32 (n_entries, width), and their squared lengths."""
    table = torch.from_numpy(CODEBOOKS[qtype].entries)
    return table.to(device), table.square().sum(1).to(device)
