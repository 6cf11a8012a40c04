"""The column-by-column parts of GPTQ and of the descent on an NVIDIA GPU, in Triton.

Rows are independent: a program owns some rows and walks the columns with what changes in its
registers. The same walks in torch (`quantkit.gptq.solver.walk_columns`,
`quantkit.gptq.descent.step_block`) are the references. Imported only where tensors are on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.ggml.searches_cuda import clamp, nearest_integer, tl, triton

if TYPE_CHECKING:
    from quantkit.gptq.descent import RowState

WINDOW = 256  # columns that one launch of the descent holds; every block size divides it
_WALK_COLUMNS = 128  # at most, of one block in GPTQ's walk
_WALK_ROWS, _WALK_WARPS = 32, 2  # as measured on an H200, like the next
_DESCENT_ROWS, _DESCENT_WARPS = 4, 1


@triton.jit
def _nearest(level, middles):  # type: ignore[no-untyped-def]
    """Index of the nearest of 16 table entries, as float32; `middles` are the 15 between them."""
    best = tl.zeros_like(level)
    for i in tl.static_range(15):
        best += (level > tl.load(middles + i)).to(tl.float32)
    return best


@triton.jit
def _decode(code, table, has_table: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 level of an integer code."""
    if has_table:
        return tl.load(table + code.to(tl.int32))
    else:
        return code.to(tl.float32)


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    weight,
    lower,
    scale,
    minimum,
    group_of,
    low,
    high,
    table,
    middles,
    codes,
    n_columns,
    n_rows,
    weight_step,
    scale_step,
    group_step,
    has_table: tl.constexpr,
    columns: tl.constexpr,
    tile: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    weight += expert * weight_step
    codes += expert * weight_step
    lower += expert * n_columns * n_columns
    scale += expert * scale_step
    minimum += expert * scale_step
    group_of += expert * group_step
    rows = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = rows < n_rows
    index = tl.arange(0, columns)
    least = tl.load(low + rows, mask=inside, other=0.0)
    most = tl.load(high + rows, mask=inside, other=0.0)
    errors = tl.zeros((columns, tile), tl.float32)
    for column in range(n_columns):
        # Left-looking: what the columns already decided left behind. Later rows are still zero.
        share = tl.load(lower + column * n_columns + index, mask=index < column, other=0.0)
        at = column * n_rows + rows
        value = tl.load(weight + at, mask=inside, other=0.0)
        value -= tl.sum(share[:, None] * errors, 0)
        group = tl.load(group_of + column) * n_rows + rows
        s = tl.load(scale + group, mask=inside, other=0.0)
        m = tl.load(minimum + group, mask=inside, other=0.0)
        level = tl.div_rn(value - m, tl.where(s == 0, 1.0, s))
        if has_table:
            code = _nearest(level, middles)
        else:
            code = nearest_integer(clamp(level, least, most))
        tl.store(codes + at, code.to(tl.int8), mask=inside)
        left = value - (_decode(code, table, has_table) * s + m)
        own = tl.load(lower + column * n_columns + column)
        error = tl.div_rn(left, tl.zeros_like(left) + own)
        errors = tl.where((index == column)[:, None], error[None, :], errors)
    at = index[:, None] * n_rows + rows[None, :]
    tl.store(weight + at, errors, mask=(index < n_columns)[:, None] & inside[None, :])


def gptq(
    weight: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    group_of: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    table: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Decide one block of at most 128 columns.

    `weight` float32 and `codes` int8 are (n_columns, n_rows), contiguous, written in place: weights
    become scaled errors. `upper` is the block's own (n_columns, n_columns) part of the factor.
    `scale`, `minimum` are (n_groups, n_rows), `group_of` (n_columns,) int64, `low`, `high`
    (n_rows,) float32, `table` (16,) float32 or empty. Of experts, all but `low`, `high` and `table`
    have one more axis in front, and only the last two of the others are contiguous.
    """
    n_columns, n_rows = weight.shape[-2:]
    n_experts = len(weight) if weight.dim() == 3 else 1
    _walk[(triton.cdiv(n_rows, _WALK_ROWS), n_experts)](
        weight,
        upper.mT.contiguous(),
        scale,
        minimum,
        group_of,
        low,
        high,
        table,
        (table[1:] + table[:-1]) / 2,
        codes,
        n_columns,
        n_rows,
        weight.stride(0),
        scale.stride(0),
        group_of.stride(0),
        has_table=table.numel() > 0,
        columns=_WALK_COLUMNS,
        tile=_WALK_ROWS,
        num_warps=_WALK_WARPS,
    )


@triton.jit
def _move_integer(old, unit, slope, curvature, low, high):  # type: ignore[no-untyped-def]
    """The best storable change of an integer that is worth `unit`, or the old one."""
    free = (curvature > 0) & (unit != 0)
    move = tl.div_rn(slope, tl.where(free, curvature * unit, 1.0))
    new = nearest_integer(clamp(old - move, low, high))
    step = (new - old) * unit
    good = free & (2 * step * slope + step * step * curvature < 0)
    return tl.where(good, new, old)


@triton.jit
def _to_half(x):  # type: ignore[no-untyped-def]
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _to_power(x):  # type: ignore[no-untyped-def]
    """The nearest power of two of x's size that a byte stores: `roundings_cpu.round_to_power`."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    denormal = tl.where(size >= 0x00300000, 0x00400000, 0x00200000)
    normal = tl.minimum((size + 0x00400000) & 0x7F800000, 0x7E800000)
    return tl.where(size < 0x00600000, denormal, normal).to(tl.float32, bitcast=True)


@triton.jit
def _descend(  # type: ignore[no-untyped-def]
    codes,
    moved,
    gradient,
    change,
    d,
    dmin,
    scale,
    minimum,
    hessian,
    group_sums,
    table,
    middles,
    n_rows,
    n_columns,
    first,
    n_blocks,
    width: tl.constexpr,
    group: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    sign: tl.constexpr,
    is_power: tl.constexpr,
    has_table: tl.constexpr,
    has_min: tl.constexpr,
    scale_low: tl.constexpr,
    scale_high: tl.constexpr,
    min_low: tl.constexpr,
    min_high: tl.constexpr,
    window: tl.constexpr,
    tile: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    hessian += expert * n_columns * n_columns
    group_sums += expert * (n_columns // group) * n_columns
    start = tl.program_id(0).to(tl.int64) * tile
    rows = tl.arange(0, tile)
    inside = start + rows < n_rows
    start += expert * n_rows
    codes += start * n_columns + first
    gradient += start * n_columns + first
    moved += start * window
    change += start * window
    d += (start * n_columns + first) // width
    dmin += (start * n_columns + first) // width
    scale += (start * n_columns + first) // group
    minimum += (start * n_columns + first) // group
    index = tl.arange(0, window)
    real = index < n_blocks * width
    both = inside[:, None] & real[None, :]
    column_at = rows * n_columns
    block_at = rows * (n_columns // width)
    group_at = rows * (n_columns // group)
    columns = column_at[:, None] + index[None, :]
    blocks = block_at[:, None] + (index // width)[None, :]
    groups = group_at[:, None] + (index // group)[None, :]

    slope = tl.load(gradient + columns, mask=both, other=0.0)
    u = _decode(tl.load(codes + columns, mask=both, other=0), table, has_table)
    before = u * tl.load(scale + groups, mask=both, other=0.0)
    before *= tl.load(d + blocks, mask=both, other=0.0)
    if has_min:
        floor = tl.load(minimum + groups, mask=both, other=0.0) * sign
        before += floor * tl.load(dmin + blocks, mask=both, other=0.0)
    # Held in memory meanwhile: registers are what is short here. What a thread writes others may
    # read only behind a barrier, so new codes have a place of their own.
    own_at = rows * window
    into = own_at[:, None] + index[None, :]
    tl.store(change + into, before, mask=both)

    for block in range(n_blocks):
        own_d = tl.load(d + block_at + block, mask=inside, other=0.0)
        for column in range(block * width, (block + 1) * width):
            line = tl.load(hessian + column * n_columns + index, mask=real, other=0.0)
            pivot = tl.load(hessian + column * n_columns + column)
            stored = tl.load(codes + column_at + column, mask=inside, other=0)
            worth = own_d * tl.load(scale + group_at + column // group, mask=inside, other=0.0)
            free = worth != 0
            per_slope = 1.0 / (pivot * tl.where(free, worth, 1.0))
            old = _decode(stored, table, has_table)
            here = tl.sum(tl.where((index == column)[None, :], slope, 0.0), 1)
            level = old - here * per_slope
            if has_table:
                code = _nearest(level, middles)
            else:
                code = nearest_integer(clamp(level, low, high))
            step = tl.where(free, (_decode(code, table, has_table) - old) * worth, 0.0)
            code = tl.where(free, code, stored.to(tl.float32))
            tl.store(moved + own_at + column, code.to(tl.int8), mask=inside)
            slope += step[:, None] * line[None, :]
        tl.debug_barrier()  # other threads read the codes now

        here = (index // width == block)[None, :]
        u = _decode(tl.load(moved + into, mask=both & here, other=0), table, has_table)
        hu = tl.zeros((tile, window), tl.float32)  # of what d is multiplied with, times the Hessian
        hv = tl.zeros((tile, window), tl.float32)  # of what dmin is multiplied with
        own_min = own_d
        if has_min:
            own_min = sign * tl.load(dmin + block_at + block, mask=inside, other=0.0)
        for k in range(block * (width // group), (block + 1) * (width // group)):
            here = (index // group == k)[None, :]
            reach = tl.zeros((tile, window), tl.float32)  # of the group's levels, times the Hessian
            for column in range(k * group, (k + 1) * group):
                line = tl.load(hessian + column * n_columns + index, mask=real, other=0.0)
                stored = tl.load(moved + own_at + column, mask=inside, other=0)
                reach += _decode(stored, table, has_table)[:, None] * line[None, :]
            integer = tl.load(scale + group_at + k, mask=inside, other=0.0)
            if scale_low <= scale_high:
                towards = tl.sum(tl.where(here, u * slope, 0.0), 1)
                curvature = tl.sum(tl.where(here, u * reach, 0.0), 1)
                new = _move_integer(integer, own_d, towards, curvature, scale_low, scale_high)
                slope += ((new - integer) * own_d)[:, None] * reach
                integer = new
                tl.debug_barrier()  # all have read the old one
                tl.store(scale + group_at + k, integer, mask=inside)
            hu += integer[:, None] * reach
            if has_min:
                line = tl.load(group_sums + k * n_columns + index, mask=real, other=0.0)
                integer = tl.load(minimum + group_at + k, mask=inside, other=0.0)
                if min_low <= min_high:
                    towards = tl.sum(tl.where(here, slope, 0.0), 1)
                    curvature = tl.sum(tl.where(here, line[None, :] + tl.zeros_like(slope), 0.0), 1)
                    new = _move_integer(integer, own_min, towards, curvature, min_low, min_high)
                    slope += ((new - integer) * own_min)[:, None] * line[None, :]
                    integer = new
                    tl.debug_barrier()
                    tl.store(minimum + group_at + k, integer, mask=inside)
                hv += (sign * integer)[:, None] * line[None, :]
        tl.debug_barrier()  # and the integers

        here = (index // width == block)[None, :]
        u = tl.where(here, u * tl.load(scale + groups, mask=both, other=0.0), 0.0)
        au = tl.sum(u * slope, 1)
        uu = tl.sum(u * hu, 1)
        free = uu > 0
        to_d = tl.where(free, tl.div_rn(-au, tl.where(free, uu, 1.0)), 0.0)
        av = tl.zeros_like(au)
        uv, vv, to_m, step_m = av, av, av, av
        if has_min:
            v = tl.where(here, sign * tl.load(minimum + groups, mask=both, other=0.0), 0.0)
            av = tl.sum(v * slope, 1)
            uv = tl.sum(v * hu, 1)
            vv = tl.sum(v * hv, 1)
            det = uu * vv - uv * uv
            two = free & (det > 1e-6 * uu * vv)
            det = tl.where(two, det, 1.0)
            to_d = tl.where(two, tl.div_rn(uv * av - vv * au, det), to_d)
            to_m = tl.where(two, tl.div_rn(uv * au - uu * av, det), to_m)
        step_d = (_to_power(own_d + to_d) if is_power else _to_half(own_d + to_d)) - own_d
        if has_min:
            old_min = sign * own_min
            step_m = _to_half(old_min + to_m) - old_min
        gain = 2 * (step_d * au + step_m * av)
        gain += step_d * step_d * uu + 2 * step_d * step_m * uv + step_m * step_m * vv
        good = free & (gain < 0)
        step_d = tl.where(good, step_d, 0.0)
        step_m = tl.where(good, step_m, 0.0)
        tl.store(d + block_at + block, own_d + step_d, mask=inside)
        slope += step_d[:, None] * hu
        if has_min:
            tl.store(dmin + block_at + block, old_min + step_m, mask=inside)
            slope += step_m[:, None] * hv
    tl.debug_barrier()

    after = _decode(tl.load(moved + into, mask=both, other=0), table, has_table)
    after *= tl.load(scale + groups, mask=both, other=0.0)
    after *= tl.load(d + blocks, mask=both, other=0.0)
    if has_min:
        floor = tl.load(minimum + groups, mask=both, other=0.0) * sign
        after += floor * tl.load(dmin + blocks, mask=both, other=0.0)
    before = tl.load(change + into, mask=both, other=0.0)
    tl.store(change + into, after - before, mask=both)


def descend(
    state: RowState,
    hessian: torch.Tensor,
    group_sums: torch.Tensor,
    table: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """Descend on the blocks of at most `WINDOW` columns from `first` on, in turn, of all rows.

    The tensors of `state`, all contiguous, are changed in place but for the gradient. `hessian` is
    the whole float32 (n, n), `group_sums` (n / group, n) its rows summed by group, `table` (16,)
    float32 or empty. Of experts both Hessians have one more axis in front, and the rows are those
    of one after the other. Returns what was added to the values, float32 (n_rows, columns of the
    window).
    """
    form, device = state.form, state.codes.device
    n_rows, n_columns = state.codes.shape
    n_experts = len(hessian) if hessian.dim() == 3 else 1
    width = form.qtype.block_size
    n_blocks = min(WINDOW, n_columns - first) // width
    scale_range, minimum_range = form.scale_range or (0, -1), form.minimum_range or (0, -1)
    change = torch.empty((n_rows, WINDOW), device=device)
    moved = torch.empty((n_rows, WINDOW), dtype=torch.int8, device=device)
    _descend[(triton.cdiv(n_rows // n_experts, _DESCENT_ROWS), n_experts)](
        state.codes,
        moved,
        state.gradient,
        change,
        state.d,
        state.dmin,
        state.scale,
        state.minimum,
        hessian[..., first:, first:],
        group_sums[..., first // form.group :, first:],
        table,
        (table[1:] + table[:-1]) / 2,
        n_rows // n_experts,
        n_columns,
        first,
        n_blocks,
        width=width,
        group=form.group,
        low=form.low,
        high=form.high,
        sign=form.dmin_sign,
        is_power=form.scale_is_power,
        has_table=form.table is not None,
        has_min=form.dmin_at is not None,
        scale_low=scale_range[0],
        scale_high=scale_range[1],
        min_low=minimum_range[0],
        min_high=minimum_range[1],
        window=WINDOW,
        tile=_DESCENT_ROWS,
        num_warps=_DESCENT_WARPS,
    )
    end = n_blocks * width
    state.codes[:, first : first + end] = moved[:, :end]
    return change[:, :end]
