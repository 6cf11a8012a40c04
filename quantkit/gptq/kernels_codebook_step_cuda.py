"""The step of the descent onto codebooks on an NVIDIA GPU, in Triton.

A program of one warp owns one row of a block of 256 columns: it skips what its row does not need,
and thousands of rows keep the GPU busy. It takes the groups in turn; what earlier ones changed
reaches a group when its turn comes. d is fitted in a second launch, after a product of all rows.
The same in torch is the reference: `quantkit.gptq.codebook_steps.step_block`. Imported only where
tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.ggml.codebooks import BLOCK
from quantkit.ggml.searches_cuda import tl, triton
from quantkit.gptq.codebook_tables import multipliers_of, sizes_of, table_of
from quantkit.gptq.kernels_codebook_units_cuda import choose, lane, lines_of, multiplied

if TYPE_CHECKING:
    from quantkit.gptq.codebook_steps import UnitBlock

REGISTERS = 128  # of a lane at most: sixteen rows at once for each multiprocessor
_FIT_ROWS = 4


@triton.jit
def _reach(values, lines, place):  # type: ignore[no-untyped-def]
    """Values (1, 8) times eight lines of a group's Hessian: as `place`, (n_units, 8)."""
    total = tl.zeros(place.shape, tl.float32)
    values = values + total
    for j in tl.static_range(8):
        total += lane(values, j) * tl.load(lines + 256 * j + place)
    return total


# One binary for all shapes: it is seconds until it is compiled.
@triton.jit(do_not_specialize=["n_rows", "gradient_step", "gradient_row", "is_diagonal"])
def _descend(  # type: ignore[no-untyped-def]
    entry,
    signs,
    integer,
    d,
    gradient,
    change,
    unit_values,
    hessian,
    inverses,
    norms,
    table,
    multipliers,
    n_rows,
    gradient_step,
    gradient_row,
    is_diagonal,
    least_step,
    half_step: tl.constexpr,
    n_integers: tl.constexpr,
    group: tl.constexpr,
    n_entries: tl.constexpr,
    n_table: tl.constexpr,
    width: tl.constexpr,
    sign_kind: tl.constexpr,
    n_listed: tl.constexpr,
    n_rounds: tl.constexpr,
):
    n_units: tl.constexpr = group // 8
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    hessian += expert * 65536
    inverses += expert * 2048
    norms += expert * (256 // width) * n_table
    gradient += expert * gradient_step + row * gradient_row
    row += expert * n_rows
    entry += row * (256 // width)
    signs += row * 32
    integer += row * (256 // group)
    change += row * 256
    unit_values += row * 256
    own_d = tl.load(d + row)
    n_groups = 256 // group
    if own_d == 0:
        n_groups = 0
        tl.store(change + tl.arange(0, 256), tl.zeros((256,), tl.float32))
        tl.store(unit_values + tl.arange(0, 256), tl.zeros((256,), tl.float32))

    unit_at = tl.arange(0, n_units)[:, None]
    i = tl.arange(0, 8)
    place = 8 * unit_at + i[None, :]
    for k in range(n_groups):
        at = k * group
        own_hessian = hessian + at * 257
        code = tl.load(integer + k).to(tl.int32)
        now = own_d * tl.load(multipliers + code)
        entries = tl.load(entry + (at + place) // width).to(tl.int32)
        levels = tl.load(table + entries * width + place % width).to(tl.float32)
        if sign_kind > 0:
            byte = tl.load(signs + (at + place) // 8).to(tl.int32)
            levels = tl.where(((byte >> (place % 8)) & 1) == 1, -levels, levels)
        side = 0
        if n_table > n_entries:
            side = (tl.load(entry + at // width) >= n_entries).to(tl.int32)
        # What the groups before changed.
        slope = tl.load(gradient + at + place)
        tl.debug_barrier()
        for unit in range(at // 8 * (1 - is_diagonal)):
            done = tl.load(change + 8 * unit + i[None, :])
            slope += _reach(done, hessian + unit * 2048 + at, place)

        before = levels * now
        reach = tl.zeros((n_units, 8), tl.float32)  # the group's levels times its Hessian
        sums = tl.zeros((n_units, 8), tl.float32)
        other = code
        best_levels, best_entries, best_code = levels, entries, code
        best_gain = now * 0
        # The integer as it is, then the next one, then the other half of the table.
        for trial in range(3 if n_table > n_entries else 2):
            if trial == 1:
                levels, entries = best_levels, best_entries
                for unit in range(n_units):
                    value = tl.sum(tl.where(unit_at == unit, levels, 0.0), 0)[None, :]
                    lines = own_hessian + unit * 2048
                    reach += _reach(value, lines, place)
                    if n_table > n_entries:
                        sums += _reach(tl.full((1, 8), 1.0, tl.float32), lines, place)
                along = tl.sum(tl.sum(levels * slope, 1), 0) * now * tl.load(multipliers + code)
                curvature = tl.sum(tl.sum(levels * reach, 1), 0) * now * now
                is_near = tl.abs(along) <= least_step * curvature
                other = code + tl.where(is_near, 0, tl.where(along > 0, -1, 1))
                other = tl.minimum(tl.maximum(other, 0), n_integers - 1)
            wanted, half, delta = code, side, now * 0
            if trial == 1:
                wanted = other
            if trial == 2:
                half = 1 - side
                delta += tl.where(side == 0, half_step, -half_step)
            if (trial != 1) | (other != code):
                scale = own_d * tl.load(multipliers + wanted)
                new_levels = levels + delta
                new_entries = entries + (half - side) * n_entries
                step = scale - now
                new_slope = slope + step * reach + delta * scale * sums
                steps = levels * step + delta * scale
                gain = tl.sum(tl.sum(steps * (slope + new_slope), 1), 0)
                for unit in range(n_units):
                    here = unit_at == unit
                    towards = tl.sum(tl.where(here, new_slope, 0.0), 0)[None, :]
                    old = tl.sum(tl.where(here, new_levels, 0.0), 0)[None, :]
                    number = (at // 8 + unit).to(tl.int64)
                    away = multiplied(towards, lines_of(inverses + number * 64, 8))
                    metric = hessian + number * 2056
                    lines = lines_of(metric, 256)
                    new, found = choose(
                        old - away / scale,
                        half,
                        lines,
                        tl.load(metric + 257 * i[None, :]),
                        norms + number * (8 // width) * n_table,
                        table,
                        n_entries,
                        n_table,
                        width,
                        sign_kind,
                        n_listed,
                        n_rounds,
                    )
                    move = (new - old) * scale
                    bend = multiplied(move, lines)
                    added = tl.sum(tl.sum(move * (2 * towards + bend), 1), 0)
                    if added < 0:
                        gain += added
                        new_slope += _reach(move, own_hessian + unit * 2048, place)
                        new_levels = tl.where(here, new, new_levels)
                        new_entries = tl.where(here, found, new_entries)
                if trial == 0:
                    slope = new_slope
                if (trial == 0) | (gain < best_gain):
                    best_levels, best_entries, best_code = new_levels, new_entries, wanted
                    best_gain = tl.where(trial == 0, 0.0, gain)

        multiplier = tl.load(multipliers + best_code)
        tl.store(change + at + place, best_levels * (own_d * multiplier) - before)
        tl.store(unit_values + at + place, best_levels * multiplier)
        tl.store(entry + (at + place) // width, best_entries.to(tl.int16), mask=place % width == 0)
        tl.store(integer + k, best_code.to(tl.int16))
        if sign_kind > 0:
            bits = tl.sum(tl.where(best_levels < 0, 1 << (place % 8), 0), 1)
            tl.store(signs + at // 8 + tl.arange(0, n_units), bits.to(tl.uint8))


@triton.jit(do_not_specialize=["n_rows", "gradient_step", "gradient_row"])
def _fit(  # type: ignore[no-untyped-def]
    d, gradient, change, unit_values, reach, n_rows, gradient_step, gradient_row, tile: tl.constexpr
):
    """d by least squares of rows whose values are d times `unit_values`; `reach` are those times
    the Hessian, and the gradient is that before `change`.
    """
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * tile + tl.arange(0, tile).to(tl.int64)
    inside = row < n_rows
    real = inside[:, None] & (tl.arange(0, 256) >= 0)[None, :]
    column = tl.arange(0, 256)[None, :]
    at = expert * gradient_step + row[:, None] * gradient_row + column
    slope = tl.load(gradient + at, mask=real, other=0.0)
    row += expert * n_rows
    at = row[:, None] * 256 + column
    unit = tl.load(unit_values + at, mask=real, other=0.0)
    moved = tl.load(change + at, mask=real, other=0.0)
    bend = tl.load(reach + at, mask=real, other=0.0)
    own_d = tl.load(d + row, mask=inside, other=0.0)
    along = tl.sum(unit * slope + moved * bend, 1)
    curvature = tl.sum(unit * bend, 1)
    can = (curvature > 0) & (own_d != 0)
    best_d = own_d - along / tl.where(can, curvature, 1.0)
    step = best_d.to(tl.float16).to(tl.float32) - own_d
    good = can & (step * (2 * along + step * curvature) < 0)
    step = tl.where(good, step, 0.0)
    tl.store(d + row, own_d + step, mask=inside)
    tl.store(change + at, moved + unit * step[:, None], mask=real)


def descend(block: UnitBlock, least_step: float, *, only_compile: bool = False) -> torch.Tensor:
    """Descend on one block of 256 columns of all rows, in place; return what was added to the
    values, float32 (..., n_rows, 256). The gradient, of which rows may be apart, is left to the
    caller. Experts, or other blocks that do not depend on each other, may be an axis in front of
    all tensors. To compile only changes nothing, and returns nothing of use.
    """
    book, device = block.book, block.d.device
    n_experts = len(block.d) if block.d.dim() == 2 else 1
    n_rows = block.d.shape[-1]
    change = torch.empty((*block.d.shape, BLOCK), device=device)
    unit_values = torch.empty_like(change)
    n_half = len(book.entries) // 2
    half_step = float(book.entries[n_half, 0] - book.entries[0, 0]) if book.halves else 0.0
    first, second = book.multipliers[:2]
    apart = block.gradient.stride(0), block.gradient.stride(-2)
    _descend.run(
        block.entry,
        block.signs,
        block.integer,
        block.d,
        block.gradient,
        change,
        unit_values,
        block.hessian,
        block.inverses,
        block.norms,
        table_of(book.qtype, device),
        multipliers_of(book.qtype, device),
        n_rows,
        *apart,
        int(block.is_diagonal),
        least_step * (second - first),
        half_step=half_step,
        n_integers=len(book.multipliers),
        group=book.group,
        **sizes_of(book),
        num_warps=1,
        maxnreg=REGISTERS,
        grid=(n_rows, n_experts),
        warmup=only_compile,
    )
    reach = unit_values @ block.hessian
    _fit.run(
        block.d,
        block.gradient,
        change,
        unit_values,
        reach,
        n_rows,
        *apart,
        tile=_FIT_ROWS,
        num_warps=_FIT_ROWS,
        grid=(triton.cdiv(n_rows, _FIT_ROWS), n_experts),
        warmup=only_compile,
    )
    return change
