"""The step of the descent onto codebooks on an NVIDIA GPU, in Triton.

A program owns some rows of a block of 256 columns, and takes its groups in turn. What passes from
lanes of columns to lanes of rows goes through memory, behind barriers. The same in torch is the
reference: `quantkit.gptq.codebook_steps.step_block`. Imported only where tensors are on a GPU.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.ggml.codebooks import BLOCK
from quantkit.ggml.searches_cuda import tl, triton
from quantkit.gptq.codebook_tables import columns_of, multipliers_of, norms_of, sizes_of
from quantkit.gptq.kernels_codebook_units_cuda import choose, multiplied

if TYPE_CHECKING:
    from quantkit.gptq.codebook_steps import UnitBlock

ROWS, WARPS = 8, 1


# One binary for all shapes: it is many seconds until it is compiled.
@triton.jit(do_not_specialize=["n_rows", "gradient_step", "gradient_row"])
def _descend(  # type: ignore[no-untyped-def]
    entry,
    signs,
    integer,
    d,
    gradient,
    change,
    slope,
    level,
    spare,
    spare_entry,
    passed,
    hessian,
    inverses,
    norms,
    columns,
    multipliers,
    n_rows,
    gradient_step,
    gradient_row,
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
    tile: tl.constexpr,
):
    passing: tl.constexpr = 48  # numbers of a row that lanes hand over
    per_unit: tl.constexpr = 8 // width
    n_groups: tl.constexpr = 256 // group
    own_entries: tl.constexpr = group // width
    expert = tl.program_id(1).to(tl.int64)
    hessian += expert * 65536
    inverses += expert * 2048
    norms += expert * 32 * per_unit * n_table
    start = tl.program_id(0).to(tl.int64) * tile
    rows = tl.arange(0, tile)
    inside = start + rows < n_rows
    gradient += expert * gradient_step + start * gradient_row
    start += expert * n_rows
    entry += start * (256 // width)
    signs += start * 32
    integer += start * n_groups
    d += start
    change += start * 256
    slope += start * 256
    level += start * 256
    spare += start * 64
    spare_entry += start * (2 * own_entries)
    passed += start * passing

    index = tl.arange(0, 256)
    real = inside[:, None] & (index >= 0)[None, :]
    whole = rows[:, None] * 256 + index[None, :]
    column = tl.arange(0, group)
    known = inside[:, None] & (column >= 0)[None, :]
    pass_at = rows[:, None] * passing + column[None, :]
    own_d = tl.load(d + rows, mask=inside, other=0.0)
    free = own_d != 0

    codes = tl.load(entry + rows[:, None] * (256 // width) + index[None, :] // width, mask=real)
    sizes = tl.load(columns + (index % width)[None, :] * n_table + codes.to(tl.int32), mask=real)
    if sign_kind > 0:
        bytes_ = tl.load(signs + rows[:, None] * 32 + index[None, :] // 8, mask=real).to(tl.int32)
        sizes = tl.where(((bytes_ >> (index % 8)[None, :]) & 1) == 1, -sizes, sizes)
    codes = tl.load(integer + rows[:, None] * n_groups + index[None, :] // group, mask=real)
    all_scales = own_d[:, None] * tl.load(multipliers + codes.to(tl.int32), mask=real)
    tl.store(level + whole, sizes, mask=real)
    tl.store(change + whole, -sizes * all_scales, mask=real)
    all_slopes = tl.load(gradient + rows[:, None] * gradient_row + index[None, :], mask=real)
    tl.store(slope + whole, all_slopes, mask=real)

    for k in range(n_groups):
        at = k * group
        own_hessian = hessian + at * 256 + at
        own = rows[:, None] * 256 + at + column[None, :]
        entry_at = rows * (256 // width) + k * own_entries
        tl.debug_barrier()
        code = tl.load(integer + rows * n_groups + k, mask=inside, other=0).to(tl.int32)
        now = own_d * tl.load(multipliers + code)
        side = tl.zeros_like(code)
        if n_table > n_entries:
            lowest = tl.load(entry + entry_at, mask=inside, other=0).to(tl.int32)
            side = (lowest >= n_entries).to(tl.int32)
        before = tl.load(level + own, mask=known, other=0.0) * now[:, None]
        slope_of_best = tl.load(slope + own, mask=known, other=0.0)
        reach = tl.zeros_like(before)  # the group's levels times its Hessian
        sums = tl.zeros((1, group), tl.float32)
        other = code
        pick = tl.zeros_like(code)
        best_gain = tl.zeros_like(now)
        # The integer as it is, then the next one, then the other half of the table.
        for trial in range(3 if n_table > n_entries else 2):
            tl.debug_barrier()
            if trial == 1:
                for i in range(group):
                    line = tl.load(own_hessian + i * 256 + column)[None, :]
                    value = tl.load(level + rows * 256 + at + i, mask=inside, other=0.0)
                    reach += value[:, None] * line
                    sums += line
                levels = tl.load(level + own, mask=known, other=0.0)
                along = tl.sum(levels * slope_of_best, 1) * now
                along *= tl.load(multipliers + code)
                curvature = tl.sum(levels * reach, 1) * now * now
                is_near = tl.abs(along) <= least_step * curvature
                other = code + tl.where(is_near, 0, tl.where(along > 0, -1, 1))
                other = tl.minimum(tl.maximum(other, 0), n_integers - 1)
            active = free
            scale, delta, half = now, tl.zeros_like(now), side
            if trial == 1:
                active = free & (other != code)
                scale = own_d * tl.load(multipliers + other)
            if trial == 2:
                half = 1 - side
                delta = tl.where(side == 0, half_step, -half_step)
            if tl.max(active.to(tl.int32), 0) > 0:
                divisor = tl.where(active, scale, 1.0)
                step = scale - now
                levels = tl.load(level + own, mask=known, other=0.0)
                slopes = slope_of_best + step[:, None] * reach + (delta * scale)[:, None] * sums
                steps = levels * step[:, None] + (delta * scale)[:, None]
                gain = tl.sum(steps * (slope_of_best + slopes), 1)
                for unit in range(group // 8):
                    tl.debug_barrier()
                    tl.store(passed + pass_at, slopes, mask=known)
                    tl.debug_barrier()
                    metric_at = (at // 8 + unit).to(tl.int64)
                    towards, old = (), ()
                    for i in tl.static_range(8):
                        place = 8 * unit + i
                        value = tl.load(passed + rows * passing + place, mask=inside, other=0.0)
                        towards = towards + (value,)
                        value = tl.load(level + rows * 256 + at + place, mask=inside, other=0.0)
                        old = old + (value + delta,)
                    away = multiplied(inverses + metric_at * 64, towards, 8)
                    # Through memory, so that the layout of other numbers does not become that of
                    # the look over the table.
                    wanted = passed + rows * passing + 32
                    for i in tl.static_range(8):
                        tl.store(wanted + i, old[i] - away[i] / divisor, mask=inside)
                    tl.store(wanted + 8, half.to(tl.float32), mask=inside)
                    tl.debug_barrier()
                    target = ()
                    for i in tl.static_range(8):
                        target = target + (tl.load(wanted + i, mask=inside, other=0.0),)
                    own_half = tl.load(wanted + 8, mask=inside, other=0.0).to(tl.int32)
                    new, one, two = choose(
                        target,
                        own_half,
                        hessian + (at + 8 * unit) * 257,
                        norms + metric_at * per_unit * n_table,
                        columns,
                        n_entries,
                        n_table,
                        width,
                        sign_kind,
                        n_listed,
                        n_rounds,
                        256,
                    )
                    moves = ()
                    for i in tl.static_range(8):
                        moves = moves + ((new[i] - old[i]) * scale,)
                    bends = multiplied(hessian + (at + 8 * unit) * 257, moves, 256)
                    added = moves[0] * (2 * towards[0] + bends[0])
                    for i in tl.static_range(1, 8):
                        added += moves[i] * (2 * towards[i] + bends[i])
                    good = active & (added < 0)
                    gain += tl.where(good, added, 0.0)
                    for i in tl.static_range(8):
                        move = tl.where(good, moves[i], 0.0)
                        line = tl.load(own_hessian + (8 * unit + i) * 256 + column)
                        slopes += move[:, None] * line[None, :]
                        value = tl.where(good, new[i], old[i])
                        place = 8 * unit + i
                        if trial == 0:
                            tl.store(level + rows * 256 + at + place, value, mask=inside)
                        else:
                            there = rows * 64 + (trial - 1) * 32
                            tl.store(spare + there + place, value, mask=inside)
                    moved = tl.where(half > side, n_entries, tl.where(half < side, -n_entries, 0))
                    for i in tl.static_range(per_unit):
                        place = per_unit * unit + i
                        value = tl.load(entry + entry_at + place, mask=inside, other=0)
                        value = tl.where(good, one if i == 0 else two, value.to(tl.int32) + moved)
                        value = value.to(tl.int16)
                        if trial == 0:
                            tl.store(entry + entry_at + place, value, mask=inside)
                        else:
                            there = rows * (2 * own_entries) + (trial - 1) * own_entries
                            tl.store(spare_entry + there + place, value, mask=inside)
                if trial == 0:
                    slope_of_best = slopes
                else:
                    better = active & (gain < best_gain)
                    best_gain = tl.where(better, gain, best_gain)
                    pick = tl.where(better, trial, pick)
        tl.debug_barrier()

        levels = tl.load(level + own, mask=known, other=0.0)
        taken = known & (pick > 0)[:, None]
        from_spare = (rows * 64 + (pick - 1) * 32)[:, None] + column[None, :]
        levels = tl.where(taken, tl.load(spare + from_spare, mask=taken, other=0.0), levels)
        code = tl.where(pick == 1, other, code)
        now = own_d * tl.load(multipliers + code)
        steps = tl.where(free[:, None], levels * now[:, None] - before, 0.0)
        place = tl.arange(0, own_entries)
        taken = (inside & (pick > 0))[:, None] & (place >= 0)[None, :]
        from_spare = (rows * (2 * own_entries) + (pick - 1) * own_entries)[:, None] + place[None, :]
        value = tl.load(spare_entry + from_spare, mask=taken, other=0)
        tl.debug_barrier()
        tl.store(entry + entry_at[:, None] + place[None, :], value, mask=taken)
        tl.store(level + own, levels, mask=known)
        tl.store(integer + rows * n_groups + k, code.to(tl.int16), mask=inside)
        tl.store(passed + pass_at, steps, mask=known)
        if sign_kind > 0:
            bits = tl.where(levels < 0, 1 << (column % 8)[None, :], 0)
            found = tl.sum(bits.reshape(tile, group // 8, 8), 2).to(tl.uint8)
            sign_at = rows[:, None] * 32 + at // 8 + tl.arange(0, group // 8)[None, :]
            tl.store(signs + sign_at, found, mask=free[:, None] & (sign_at >= 0))
        tl.debug_barrier()
        all_slopes = tl.load(slope + whole, mask=real, other=0.0)
        for i in range(group):
            move = tl.load(passed + rows * passing + i, mask=inside, other=0.0)
            all_slopes += move[:, None] * tl.load(hessian + (at + i) * 256 + index)[None, :]
        tl.store(slope + whole, all_slopes, mask=real)
    tl.debug_barrier()

    codes = tl.load(integer + rows[:, None] * n_groups + index[None, :] // group, mask=real)
    unit_values = tl.load(level + whole, mask=real, other=0.0)
    unit_values *= tl.load(multipliers + codes.to(tl.int32), mask=real)
    tl.debug_barrier()
    tl.store(level + whole, unit_values, mask=real)
    tl.debug_barrier()
    reach = tl.zeros((tile, 256), tl.float32)
    for i in range(256):
        value = tl.load(level + rows * 256 + i, mask=inside, other=0.0)
        reach += value[:, None] * tl.load(hessian + i * 256 + index)[None, :]
    along = tl.sum(unit_values * tl.load(slope + whole, mask=real, other=0.0), 1)
    curvature = tl.sum(unit_values * reach, 1)
    can = (curvature > 0) & free
    best_d = own_d - along / tl.where(can, curvature, 1.0)
    step = best_d.to(tl.float16).to(tl.float32) - own_d
    good = can & (step * (2 * along + step * curvature) < 0)
    own_d += tl.where(good, step, 0.0)
    tl.store(d + rows, own_d, mask=inside)
    before = tl.load(change + whole, mask=real, other=0.0)
    tl.store(change + whole, unit_values * own_d[:, None] + before, mask=real)


def descend(block: UnitBlock, least_step: float) -> torch.Tensor:
    """Descend on one block of 256 columns of all rows, in place; return what was added to the
    values, float32 (..., n_rows, 256). The gradient, of which rows may be apart, is left to the
    caller. Experts, or other blocks that do not depend on each other, may be an axis in front of
    all tensors.
    """
    book, device = block.book, block.d.device
    n_experts = len(block.d) if block.d.dim() == 2 else 1
    n_rows = block.d.shape[-1]
    many = n_experts * n_rows
    floats = torch.empty((many, 2 * BLOCK + 64 + 48), device=device)
    slope, level, spare, passed = (
        part.view(-1) for part in floats.view(-1).split([many * n for n in (BLOCK, BLOCK, 64, 48)])
    )
    change = torch.empty((*block.d.shape, BLOCK), device=device)
    per_group = book.group // book.width
    spare_entry = torch.empty((many, 2 * per_group), dtype=torch.int16, device=device)
    n_half = len(book.entries) // 2
    half_step = float(book.entries[n_half, 0] - book.entries[0, 0]) if book.halves else 0.0
    first, second = book.multipliers[:2]
    _descend[(triton.cdiv(n_rows, ROWS), n_experts)](
        block.entry,
        block.signs,
        block.integer,
        block.d,
        block.gradient,
        change,
        slope,
        level,
        spare,
        spare_entry,
        passed,
        block.hessian,
        block.inverses,
        norms_of(book, block.metrics),
        columns_of(book.qtype, device),
        multipliers_of(book.qtype, device),
        n_rows,
        block.gradient.stride(0),
        block.gradient.stride(-2),
        least_step * (second - first),
        half_step=half_step,
        n_integers=len(book.multipliers),
        group=book.group,
        **sizes_of(book),
        tile=ROWS,
        num_warps=WARPS,
    )
    return change
