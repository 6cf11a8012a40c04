"""Search for scales under importances as ggml does, on an NVIDIA GPU in Triton: Q2_K to Q6_K.

A model of seven billion weights keeps 16 cores busy for ten minutes with it. The candidates tried
and the order of steps are those of `quantize_row_*_impl` in ggml-quants.c, so that the rows are
ggml's but for ties that rounding settles differently. A program owns some blocks of 256 weights.
Imported only where weights are on a GPU.
"""

from __future__ import annotations

import torch

from quantkit.errors import QuantkitError
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise QuantkitError(
        "Quantizing on a GPU needs Triton, which is not installed.",
        "Install PyTorch's CUDA build for Linux, which brings it, or use --device cpu.",
    ) from error

_TILE = 4  # blocks of a program
_TINY = tl.constexpr(1e-15)  # ggml takes smaller maxima for zero

# Beside the format's own numbers: the mean square of a block, times this, tempers the importances;
# None leaves them as they are.
_SPREAD = {"Q2_K": 1.0, "Q3_K": 2.0, "Q4_K": 2.0, "Q5_K": 2.0, "Q6_K": None}
TYPES = tuple(QuantType(name) for name in _SPREAD)


@triton.jit
def nearest_integer(x):  # type: ignore[no-untyped-def]
    """Round float32 |x| < 2^22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x, low, high):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _affine_group(values, weights, top):  # type: ignore[no-untyped-def]
    """Scale and minimum of groups along the last axis, codes from 0 to `top`: (.., .., 1) each."""
    minimum = tl.minimum(tl.min(values, 2, keep_dims=True), 0.0)
    largest = tl.max(values, 2, keep_dims=True)
    flat = largest <= minimum
    width = tl.where(flat, 1.0, largest - minimum)
    sum_w = tl.sum(weights, 2, keep_dims=True)
    sum_x = tl.sum(weights * values, 2, keep_dims=True)
    inverse = tl.div_rn(tl.zeros_like(width) + top, width)
    scale = tl.div_rn(tl.zeros_like(width) + 1.0, inverse)
    code = clamp(nearest_integer(inverse * (values - minimum)), 0.0, top)
    off = scale * code + minimum - values
    best = tl.sum(weights * off * off, 2, keep_dims=True)
    for step in range(37):
        width = tl.where(flat, 1.0, largest - minimum)  # from the best minimum so far, as ggml does
        inverse = tl.div_rn(tl.zeros_like(width) + (top - 0.9 + 0.05 * step), width)
        code = clamp(nearest_integer(inverse * (values - minimum)), 0.0, top)
        sum_l = tl.sum(weights * code, 2, keep_dims=True)
        sum_ll = tl.sum(weights * code * code, 2, keep_dims=True)
        sum_lx = tl.sum(weights * code * values, 2, keep_dims=True)
        det = sum_w * sum_ll - sum_l * sum_l
        solvable = det > 0
        det = tl.where(solvable, det, 1.0)
        new_scale = tl.div_rn(sum_w * sum_lx - sum_x * sum_l, det)
        new_minimum = tl.div_rn(sum_ll * sum_x - sum_l * sum_lx, det)
        above = new_minimum > 0
        alone = tl.div_rn(sum_lx, tl.where(solvable, sum_ll, 1.0))
        new_scale = tl.where(above, alone, new_scale)
        new_minimum = tl.where(above, 0.0, new_minimum)
        off = new_scale * code + new_minimum - values
        error = tl.sum(weights * off * off, 2, keep_dims=True)
        better = solvable & (error < best)
        best = tl.where(better, error, best)
        scale = tl.where(better, new_scale, scale)
        minimum = tl.where(better, new_minimum, minimum)
    return tl.where(flat, 0.0, scale), minimum


@triton.jit
def _nonnegative(values, weights, top, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """`values` (.., n) >= 0 as integers from 0 to `top` times a scale (.., 1)."""
    index = tl.arange(0, n)[None, :]
    largest = tl.max(values, 1, keep_dims=True)
    flat = largest < _TINY
    largest = tl.where(flat, 1.0, largest)
    best_inverse = tl.div_rn(tl.zeros_like(largest) + top, largest)
    off = values - nearest_integer(best_inverse * values) * tl.div_rn(
        tl.zeros_like(largest) + 1.0, best_inverse
    )
    best = tl.sum(weights * off * off, 1, keep_dims=True)
    for step in range(9):
        inverse = tl.div_rn(tl.zeros_like(largest) + (top + 0.1 * (step - 4)), largest)
        code = tl.minimum(nearest_integer(inverse * values), top)
        off = values - code * tl.div_rn(tl.zeros_like(largest) + 1.0, inverse)
        error = tl.sum(weights * off * off, 1, keep_dims=True)
        better = error < best
        best = tl.where(better, error, best)
        best_inverse = tl.where(better, inverse, best_inverse)
    code = clamp(nearest_integer(best_inverse * values), 0.0, top)
    sum_lx = tl.sum(weights * values * code, 1, keep_dims=True)
    sum_ll = tl.sum(weights * code * code, 1, keep_dims=True)
    for step in range(5 * n):
        here = index == step % n
        value = tl.sum(tl.where(here, values, 0.0), 1, keep_dims=True)
        weight = tl.sum(tl.where(here, weights, 0.0), 1, keep_dims=True)
        old = tl.sum(tl.where(here, code, 0.0), 1, keep_dims=True)
        rest_lx = sum_lx - weight * value * old
        rest_ll = sum_ll - weight * old * old
        usable = (rest_lx > 0) & (rest_ll > 0)
        new = tl.div_rn(value * rest_ll, tl.where(usable, rest_lx, 1.0))
        new = nearest_integer(clamp(new, 0.0, top))
        rest_lx += weight * value * new
        rest_ll += weight * new * new
        better = usable & (rest_lx * rest_lx * sum_ll > sum_lx * sum_lx * rest_ll)
        code = tl.where(here & better, new, code)
        sum_lx = tl.where(better, rest_lx, sum_lx)
        sum_ll = tl.where(better, rest_ll, sum_ll)
    usable = (sum_ll > 0) & (flat == 0)
    scale = tl.where(usable, tl.div_rn(sum_lx, tl.where(usable, sum_ll, 1.0)), 0.0)
    return tl.where(flat, 0.0, code), scale


@triton.jit
def _farthest(values, axis: tl.constexpr, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of the values along `axis` that is farthest from zero."""
    index = tl.arange(0, n)[None, :]
    if axis == 2:
        index = index[:, None, :]
    size = tl.abs(values)
    index += tl.zeros_like(size).to(tl.int32)
    largest = tl.max(size, axis, keep_dims=True)
    first = tl.min(tl.where(size == largest, index, n), axis, keep_dims=True)
    return tl.sum(tl.where(index == first, values, 0.0), axis, keep_dims=True)


@triton.jit
def _symmetric(values, weights, top, axis: tl.constexpr, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale of groups along `axis`, codes from -top to top - 1, and the factor that the codes were
    found with.
    """
    farthest = _farthest(values, axis, n)
    flat = tl.abs(farthest) < _TINY
    farthest = tl.where(flat, 1.0, farthest)
    factor = tl.div_rn(tl.zeros_like(farthest) - top, farthest)
    scale = tl.zeros_like(farthest)
    best = tl.zeros_like(farthest)
    for step in range(20):
        # The plain factor comes first, then the others around it; ggml counts from -9 to 9.
        around = tl.where(step == 0, 0.0, 0.1 * (step - 10))
        new = tl.div_rn(tl.zeros_like(farthest) - (top + around), farthest)
        code = clamp(nearest_integer(new * values), -top, top - 1.0)
        sum_lx = tl.sum(weights * values * code, axis, keep_dims=True)
        sum_ll = tl.sum(weights * code * code, axis, keep_dims=True)
        usable = sum_ll > 0
        better = usable & ((sum_lx * sum_lx > best * sum_ll) | (step == 0))
        fitted = tl.div_rn(sum_lx, tl.where(usable, sum_ll, 1.0))
        scale = tl.where(better, fitted, scale)
        best = tl.where(better, fitted * sum_lx, best)
        factor = tl.where(better, new, factor)
    return tl.where(flat, 0.0, scale), tl.where(flat, 0.0, factor)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x,
    importance,
    codes,
    scales,
    minimums,
    d,
    dmin,
    n_blocks,
    blocks_per_row,
    spread,
    low: tl.constexpr,
    high: tl.constexpr,
    limit: tl.constexpr,
    tempered: tl.constexpr,
    affine: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
):
    groups: tl.constexpr = 256 // group
    block = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = (block < n_blocks)[:, None, None]
    place = tl.arange(0, groups)[None, :, None] * group + tl.arange(0, group)[None, None, :]
    at = block.to(tl.int64)[:, None, None] * 256 + place
    values = tl.load(x + at, mask=inside, other=0.0)
    of_column = (block % blocks_per_row)[:, None, None] * 256 + place
    weights = tl.load(importance + of_column, mask=inside, other=0.0)
    if tempered:
        mean = tl.sum(tl.sum(values * values, 2), 1)[:, None, None] * spread
        weights *= tl.sqrt_rn(mean + values * values)
    sums = tl.sum(weights, 2)

    if affine:
        scale, minimum = _affine_group(values, weights, high * 1.0)
        floors = tl.reshape(-minimum, (tile, groups))
        multiplier, own_d = _nonnegative(
            tl.reshape(scale, (tile, groups)), sums, limit * 1.0, groups
        )
        floor_multiplier, own_dmin = _nonnegative(floors, sums, limit * 1.0, groups)
    else:
        scale, _factor = _symmetric(values, weights, -low * 1.0, 2, group)
        flat = tl.reshape(scale, (tile, groups))
        if tempered:  # Q3_K: scales are integers from -32 to 31
            own_d, factor = _symmetric(flat, sums, limit + 1.0, 1, groups)
            multiplier = clamp(nearest_integer(factor * flat), -limit - 1.0, limit * 1.0)
        else:  # Q6_K: the farthest becomes -128
            farthest = _farthest(flat, 1, groups)
            usable = tl.abs(farthest) >= _TINY
            factor = tl.div_rn(tl.zeros_like(farthest) - 128.0, tl.where(usable, farthest, 1.0))
            own_d = tl.where(usable, tl.div_rn(tl.zeros_like(factor) + 1.0, factor), 0.0)
            multiplier = tl.minimum(nearest_integer(factor * flat), limit * 1.0)
            multiplier = tl.where(usable, multiplier, 0.0)
        floor_multiplier, own_dmin = multiplier, own_d * 0.0

    own_d = own_d.to(tl.float16).to(tl.float32)
    own_dmin = own_dmin.to(tl.float16).to(tl.float32)
    step = (own_d * multiplier)[:, :, None]
    floor = (own_dmin * floor_multiplier)[:, :, None]
    level = tl.div_rn(values + floor, tl.where(step == 0, 1.0, step) + tl.zeros_like(values))
    code = nearest_integer(clamp(level, low * 1.0, high * 1.0))
    tl.store(codes + at, code.to(tl.int8), mask=inside)
    of_group = block[:, None] * groups + tl.arange(0, groups)[None, :]
    here = (block < n_blocks)[:, None]
    tl.store(scales + of_group, multiplier, mask=here)
    tl.store(minimums + of_group, floor_multiplier, mask=here)
    tl.store(d + block[:, None], own_d, mask=here)
    tl.store(dmin + block[:, None], own_dmin, mask=here)


def quantize(weight: torch.Tensor, qtype: QuantType, importance: torch.Tensor) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) of float32 `weight` (n_rows, n_columns), for one
    of `TYPES`, with `importance` float32 (n_columns,) for all rows.

    Raises QuantkitError when the weights hold NaN or infinite values, like
    `quantkit.ggml.native.quantize`.
    """
    form, spread = FORMATS[qtype], _SPREAD[qtype.name]
    n_rows, n_columns = weight.shape
    n_blocks = n_rows * n_columns // 256
    assert form.scale_range is not None
    device = weight.device
    codes = torch.empty((n_rows, n_columns), dtype=torch.int8, device=device)
    scales, minimums = (
        torch.empty((n_rows, n_columns // form.group), device=device) for _ in range(2)
    )
    d, dmin = (torch.empty((n_rows, n_columns // 256), device=device) for _ in range(2))
    _quantize[(triton.cdiv(n_blocks, _TILE),)](
        weight.contiguous(),
        importance,
        codes,
        scales,
        minimums,
        d,
        dmin,
        n_blocks,
        n_columns // 256,
        (spread or 0.0) / 256,
        low=form.low,
        high=form.high,
        limit=form.scale_range[1],
        tempered=spread is not None,
        affine=form.dmin_at is not None,
        group=form.group,
        tile=_TILE,
        num_warps=4,
        enable_fp_fusion=False,  # sums in ggml's way of rounding: fewer ties fall elsewhere
    )
    both = d if form.dmin_at is None else torch.cat([d, dmin], 1)
    if not bool(torch.isfinite(both).all() & torch.isfinite(weight).all()):
        raise QuantkitError(
            f"Quantizing to {qtype} gave invalid blocks.",
            "The weights hold NaN or infinite values.",
        )
    packed = torch.zeros((n_rows, qtype.row_bytes(n_columns)), dtype=torch.uint8, device=device)
    packed = form.with_codes(packed, codes)
    return form.with_scales(form.with_multipliers(packed, scales, minimums), both)
