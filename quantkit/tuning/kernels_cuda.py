"""Values of packed rows and their gradients on an NVIDIA GPU, in Triton: one pass over memory each.

The torch form, in `tunable`, is the reference; it reads and writes the weights a dozen times, which
is most of a tuning step of a large model. A program owns some groups of columns that share a scale.
Imported only where tensors are on a GPU.
"""

from __future__ import annotations

import torch

from quantkit.ggml.formats import Format
from quantkit.ggml.searches_cuda import clamp, nearest_integer, tl, triton

_WEIGHTS = 2048  # of a program, whole groups


@triton.jit
def _level_of(level, table, low, high, has_table: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the code nearest to `level` is multiplied with."""
    if has_table:
        found = tl.zeros_like(level) + tl.load(table)
        for i in tl.static_range(1, 16):
            below, own = tl.load(table + i - 1), tl.load(table + i)
            found = tl.where(level > (below + own) / 2, own, found)
        return found
    else:
        return nearest_integer(clamp(level, low, high))


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    level,
    scale,
    minimum,
    table,
    out,
    n_groups,
    unit,
    low,
    high,
    has_table: tl.constexpr,
    has_minimum: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = groups < n_groups
    at = groups[:, None] * group + tl.arange(0, group)[None, :]
    found = tl.load(level + at, mask=inside[:, None], other=0.0) * unit
    found = _level_of(found, table, low, high, has_table)
    found *= tl.load(scale + groups, mask=inside, other=0.0)[:, None]
    if has_minimum:
        found += tl.load(minimum + groups, mask=inside, other=0.0)[:, None]
    tl.store(out + at, found, mask=inside[:, None])


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    gradient,
    level,
    scale,
    table,
    to_level,
    by_level,
    plain,
    n_groups,
    unit,
    low,
    high,
    least,
    most,
    has_table: tl.constexpr,
    has_minimum: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = groups < n_groups
    at = groups[:, None] * group + tl.arange(0, group)[None, :]
    pull = tl.load(gradient + at, mask=inside[:, None], other=0.0)
    own = tl.load(level + at, mask=inside[:, None], other=0.0)
    scales = tl.load(scale + groups, mask=inside, other=0.0)
    reached = (own > least) & (own < most)  # beyond the last codes nothing pulls
    tl.store(
        to_level + at, tl.where(reached, pull * (scales * unit)[:, None], 0.0), inside[:, None]
    )
    levels = _level_of(own * unit, table, low, high, has_table)
    tl.store(by_level + groups, tl.sum(pull * levels, 1), mask=inside)
    if has_minimum:
        tl.store(plain + groups, tl.sum(pull, 1), mask=inside)


def values(
    form: Format,
    level: torch.Tensor,
    unit: float,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
) -> torch.Tensor:
    """Return the values, float32 (n_rows, n_columns), of rows whose codes are the nearest to
    `level`, float32 of that shape, in steps of `unit`; `scale` and `minimum` are float32 (n_rows,
    n_groups). Products and sums are rounded one by one, as ggml rounds them.
    """
    level, scale = level.contiguous(), scale.contiguous()
    out = torch.empty_like(level)
    tile, n_groups = _WEIGHTS // form.group, scale.numel()
    with torch.cuda.device_of(level):
        _values[(triton.cdiv(n_groups, tile),)](
            level,
            scale,
            scale if minimum is None else minimum.contiguous(),
            _table(form, level),
            out,
            n_groups,
            unit,
            float(form.low),
            float(form.high),
            has_table=form.table is not None,
            has_minimum=minimum is not None,
            group=form.group,
            tile=tile,
            enable_fp_fusion=False,
        )
    return out


def gradients(
    form: Format,
    gradient: torch.Tensor,
    level: torch.Tensor,
    unit: float,
    reach: tuple[float, float],
    scale: torch.Tensor,
    has_minimum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient by `level`, float32 (n_rows, n_columns), zero outside of `reach`, and for
    every group (n_rows, n_groups) the sums of `gradient` times what codes stand for, and of
    `gradient` itself; the last is empty without a minimum.
    """
    gradient, level, scale = gradient.contiguous(), level.contiguous(), scale.contiguous()
    to_level, by_level = torch.empty_like(level), torch.empty_like(scale)
    plain = torch.empty_like(scale) if has_minimum else scale.new_empty(0)
    tile, n_groups = _WEIGHTS // form.group, scale.numel()
    with torch.cuda.device_of(level):
        _gradients[(triton.cdiv(n_groups, tile),)](
            gradient,
            level,
            scale,
            _table(form, level),
            to_level,
            by_level,
            plain,
            n_groups,
            unit,
            float(form.low),
            float(form.high),
            *reach,
            has_table=form.table is not None,
            has_minimum=has_minimum,
            group=form.group,
            tile=tile,
        )
    return to_level, by_level, plain


def _table(form: Format, beside: torch.Tensor) -> torch.Tensor:
    return torch.tensor(form.table or (0,), dtype=torch.float32, device=beside.device)
