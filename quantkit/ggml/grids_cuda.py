"""Quantize as ggml does on an NVIDIA GPU, in Triton: the types that have a grid, under importances
or rounded to nearest.

A model of seven billion weights keeps 16 cores busy for ten minutes with a type. The candidates
tried and the order of steps are ggml's (`searches_cuda.py`), so that the rows are ggml's but for
ties that rounding settles differently. A program owns some blocks. Imported only where weights are
on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.errors import QuantkitError
from quantkit.ggml import rounding
from quantkit.ggml.formats import FORMATS, Format
from quantkit.ggml.searches_cuda import (
    TINY,
    affine,
    clamp,
    farthest_of,
    in_table,
    index_in,
    largest_first,
    nearest_integer,
    nonnegative,
    quotient,
    refined,
    symmetric,
    tl,
    triton,
)
from quantkit.ggml.types import QuantType

_TILE = 1024  # weights of a program


@dataclass(frozen=True)
class _Search:
    """How a type's scales are searched. `weights` are those of `_weights`, `spread` times the mean
    square of a block tempers importances; what follows are candidates of `affine`.
    """

    kind: str
    weights: str
    spread: float = 0.0
    candidates: tuple[float, float, int, bool] = (-0.9, 0.05, 36, False)


# Of `quantize_row_*_impl` with importances, and of `quantize_row_*_ref`. Q8_0 has no search.
_WEIGHTED = {
    "Q2_K": _Search("affine", "of block", 1.0),
    "Q3_K": _Search("symmetric", "of block", 2.0),
    "Q4_K": _Search("affine", "of block", 2.0),
    "Q5_K": _Search("affine", "of block", 2.0),
    "Q6_K": _Search("symmetric", "plain"),
    "IQ4_XS": _Search("table", "of block", 2.0),
    "IQ4_NL": _Search("table", "of block", 2.0),
    "Q4_0": _Search("symmetric", "of row"),
    "Q5_0": _Search("symmetric", "of row"),
    "Q4_1": _Search("affine", "of row"),
    "Q5_1": _Search("affine", "of row"),
}
_UNWEIGHTED = {
    "Q2_K": _Search("affine", "size", candidates=(-0.5, 0.1, 15, True)),
    "Q3_K": _Search("refined", "square"),
    "Q4_K": _Search("affine", "size over mean", candidates=(-1.0, 0.1, 20, False)),
    "Q5_K": _Search("affine", "size over mean", candidates=(-0.5, 0.1, 15, False)),
    "Q6_K": _Search("symmetric", "square"),
    "IQ4_XS": _Search("table", "square"),
    "IQ4_NL": _Search("table", "square"),
}


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    values, importance, row_means, at_column, block, row, inside, spread, kind: tl.constexpr
):
    """What a search minimizes squares under, like `values` (blocks, groups, columns)."""
    if kind == "size":
        return tl.abs(values)
    elif kind == "square":
        return values * values
    elif kind == "size over mean":
        mean = tl.sum(values * values, 2, keep_dims=True) / values.shape[2]
        return tl.sqrt_rn(mean) + tl.abs(values)
    else:
        weights = tl.load(importance + at_column, mask=inside, other=0.0)
        if kind == "of block":
            mean = tl.sum(tl.sum(values * values, 2), 1)[:, None, None] * spread
            weights *= tl.sqrt_rn(mean + values * values)
        elif kind == "of row":
            mean = tl.load(row_means + row, mask=block, other=0.0)[:, None, None]
            weights *= tl.sqrt_rn(mean + values * values)
        return weights


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x,
    importance,
    row_means,
    table,
    codes,
    scales,
    minimums,
    d,
    dmin,
    n_blocks,
    blocks_per_row,
    rows_each,
    spread,
    least,
    delta,
    n_steps,
    low: tl.constexpr,
    high: tl.constexpr,
    limit: tl.constexpr,
    kind: tl.constexpr,
    weighting: tl.constexpr,
    absolute: tl.constexpr,
    is_searched_twice: tl.constexpr,
    group: tl.constexpr,
    groups: tl.constexpr,
    tile: tl.constexpr,
):
    block = tl.program_id(0) * tile + tl.arange(0, tile)
    here = block < n_blocks
    inside = here[:, None, None]
    place = tl.arange(0, groups)[None, :, None] * group + tl.arange(0, group)[None, None, :]
    at = block.to(tl.int64)[:, None, None] * (group * groups) + place
    values = tl.load(x + at, mask=inside, other=0.0)
    row = block // blocks_per_row
    own_block = row // rows_each * blocks_per_row + block % blocks_per_row
    at_column = own_block[:, None, None] * (group * groups) + place
    weights = _weights(
        values, importance, row_means, at_column, here, row, inside, spread, weighting
    )

    # The groups' own scales, (tile, groups, 1).
    if kind == "affine":
        scale, minimum, factor, origin = affine(
            values, weights, high * 1.0, least, delta, n_steps, absolute
        )
    elif kind == "symmetric":
        scale, factor = symmetric(values, weights, -low * 1.0, 2, group)
    elif kind == "refined":
        scale = refined(values, weights, -low * 1.0, group)
    else:
        scale = in_table(values, weights, table, group)
    flat = tl.reshape(scale, (tile, groups))

    if (
        limit == 0
    ):  # one group a block, whose scale is stored as it is, its codes as they were found
        own_d, multiplier = flat, flat * 0.0 + 1.0
        own_dmin, floor_multiplier = flat * 0.0, multiplier
        if kind == "affine":
            own_dmin = tl.reshape(minimum, (tile, groups))
            code = clamp(nearest_integer(factor * (values - origin)), 0.0, high * 1.0)
        elif kind == "symmetric":
            code = clamp(nearest_integer(factor * values), low * 1.0, high * 1.0)
            code = tl.where(factor == 0, low * 1.0, code)
        else:
            usable = scale != 0
            inverse = tl.where(usable, quotient(1.0, tl.where(usable, scale, 1.0)), 0.0)
            code = index_in(table, inverse * values)
    else:
        sums = tl.sum(weights, 2)
        if kind == "affine":
            floors = tl.reshape(-minimum, (tile, groups))
            if is_searched_twice:
                multiplier, own_d = nonnegative(flat, sums, limit * 1.0, groups)
                floor_multiplier, own_dmin = nonnegative(floors, sums, limit * 1.0, groups)
            else:
                multiplier, own_d = largest_first(flat, limit * 1.0, groups)
                floor_multiplier, own_dmin = largest_first(floors, limit * 1.0, groups)
        else:
            if is_searched_twice:  # Q3_K: scales are integers from -32 to 31
                own_d, inverse = symmetric(flat, sums, limit + 1.0, 1, groups)
            else:  # the farthest becomes the lowest integer
                farthest = farthest_of(flat, 1, groups)
                usable = tl.abs(farthest) >= TINY
                farthest = tl.where(usable, farthest, 1.0)
                inverse = quotient(-(limit + 1.0), farthest)
                own_d = tl.where(usable, quotient(1.0, inverse), 0.0)
                inverse = tl.where(usable, inverse, 0.0)
            multiplier = clamp(nearest_integer(inverse * flat), -limit - 1.0, limit * 1.0)
            floor_multiplier, own_dmin = multiplier, own_d * 0.0
        if kind == "table":
            step = (own_d * multiplier)[:, :, None]
            usable = step != 0
            inverse = tl.where(usable, quotient(1.0, tl.where(usable, step, 1.0)), 0.0)
            code = index_in(table, inverse * values)
        else:
            own_d = own_d.to(tl.float16).to(tl.float32)
            own_dmin = own_dmin.to(tl.float16).to(tl.float32)
            step = (own_d * multiplier)[:, :, None]
            floor = (own_dmin * floor_multiplier)[:, :, None]
            step = tl.where(step == 0, 1.0, step) + tl.zeros_like(values)
            code = nearest_integer(clamp(tl.div_rn(values + floor, step), low * 1.0, high * 1.0))

    tl.store(codes + at, code.to(tl.int8), mask=inside)
    of_group = block[:, None] * groups + tl.arange(0, groups)[None, :]
    tl.store(scales + of_group, multiplier, mask=here[:, None])
    tl.store(minimums + of_group, floor_multiplier, mask=here[:, None])
    if limit == 0:
        tl.store(d + of_group, own_d, mask=here[:, None])
        tl.store(dmin + of_group, own_dmin, mask=here[:, None])
    else:
        tl.store(d + block[:, None], own_d, mask=here[:, None])
        tl.store(dmin + block[:, None], own_dmin, mask=here[:, None])


def quantize(
    weight: torch.Tensor, qtype: QuantType, importance: torch.Tensor | None
) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) of float32 `weight` (n_rows, n_columns), for a
    type of `FORMATS`, with `importance` float32 (n_columns,) for all rows, or (n_experts,
    n_columns) for as many rows of each expert; without it, rounded to nearest.

    Raises QuantkitError when the weights hold NaN or infinite values, like
    `quantkit.ggml.native.quantize`.
    """
    form = FORMATS[qtype]
    search = (_UNWEIGHTED if importance is None else _WEIGHTED).get(qtype.name)
    if search is None:
        packed, halves = rounding.quantize(weight, qtype)
    else:
        packed, halves = _searched(weight, form, search, importance)
    if not bool(torch.isfinite(halves).all() & torch.isfinite(weight).all()):
        raise QuantkitError(
            f"Quantizing to {qtype} gave invalid blocks.",
            "The weights hold NaN or infinite values, or are too large for its scales.",
        )
    return packed


def _searched(
    weight: torch.Tensor, form: Format, search: _Search, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows, and the d and dmin of their blocks."""
    n_rows, n_columns = weight.shape
    width, group = form.qtype.block_size, form.group
    n_blocks = n_rows * n_columns // width
    tile = _TILE // width
    device = weight.device
    codes = torch.empty((n_rows, n_columns), dtype=torch.int8, device=device)
    scales, minimums = (torch.empty((n_rows, n_columns // group), device=device) for _ in range(2))
    d, dmin = (torch.empty((n_rows, n_columns // width), device=device) for _ in range(2))
    least, delta, n_steps, absolute = search.candidates
    limit = form.scale_range[1] if form.scale_range else 0
    _quantize[(triton.cdiv(n_blocks, tile),)](
        weight.contiguous(),
        weight if importance is None else importance,
        weight.square().mean(1) if search.weights == "of row" else weight,
        torch.tensor(form.table or (0,), dtype=torch.float32, device=device),
        codes,
        scales,
        minimums,
        d,
        dmin,
        n_blocks,
        n_columns // width,
        n_rows if importance is None else n_rows // max(1, importance.numel() // n_columns),
        search.spread / width,
        least,
        delta,
        n_steps,
        low=form.low,
        high=form.high,
        limit=limit,
        kind=search.kind,
        weighting=search.weights,
        absolute=absolute,
        # ggml searches a second time, for d among the groups' scales, but for these.
        is_searched_twice=importance is not None and form.qtype.name not in ("Q6_K", "IQ4_XS"),
        group=group,
        groups=width // group,
        tile=tile,
        num_warps=4,
        enable_fp_fusion=False,  # sums in ggml's way of rounding: fewer ties fall elsewhere
    )
    halves = (d if form.dmin_at is None else torch.cat([d, dmin], 1)).half().float()
    packed = torch.zeros(
        (n_rows, form.qtype.row_bytes(n_columns)), dtype=torch.uint8, device=device
    )
    packed = form.with_codes(packed, codes)
    if form.scale_range is not None:
        packed = form.with_multipliers(packed, scales, minimums)
    return form.with_scales(packed, halves), halves
