"""ggml's searches for scales as Triton functions: each takes groups of weights with importances,
tries the candidates of its namesake in ggml-quants.c in their order, and rounds as C does.

Groups lie along the last axis of `values` and `weights` (.., .., n), unless an axis is given; what
is found for each has length 1 there. Imported only where weights are on a GPU.
"""

from __future__ import annotations

from quantkit.errors import QuantkitError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise QuantkitError(
        "Quantizing on a GPU needs Triton, which is not installed.",
        "Install PyTorch's CUDA build for Linux, or use --device cpu.",
    ) from error

TINY = tl.constexpr(1e-15)  # ggml takes smaller maxima for zero


@triton.jit
def nearest_integer(x):  # type: ignore[no-untyped-def]
    """Round float32 |x| < 2^22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x, low, high):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def quotient(a, b):  # type: ignore[no-untyped-def]
    """Return a / b, rounded to nearest; `a` may be a number."""
    return tl.div_rn(tl.zeros_like(b) + a, b)


@triton.jit
def _sized(off, absolute: tl.constexpr):  # type: ignore[no-untyped-def]
    if absolute:
        return tl.abs(off)
    else:
        return off * off


@triton.jit
def affine(  # type: ignore[no-untyped-def]
    values, weights, top, least, delta, n_steps, absolute: tl.constexpr
):
    """Return scale and minimum, codes from 0 to `top`, and the factor and origin of the codes
    (make_qkx2_quants and make_qkx3_quants, candidates top + least + delta i).
    """
    minimum = tl.minimum(tl.min(values, 2, keep_dims=True), 0.0)
    largest = tl.max(values, 2, keep_dims=True)
    flat = largest <= minimum
    width = tl.where(flat, 1.0, largest - minimum)
    sum_w = tl.sum(weights, 2, keep_dims=True)
    sum_x = tl.sum(weights * values, 2, keep_dims=True)
    factor, origin = quotient(top, width), minimum
    scale = quotient(1.0, factor)
    code = clamp(nearest_integer(factor * (values - minimum)), 0.0, top)
    best = tl.sum(weights * _sized(scale * code + minimum - values, absolute), 2, keep_dims=True)
    for step in range(n_steps + 1):
        width = tl.where(flat, 1.0, largest - minimum)  # from the best minimum so far, as ggml does
        new = quotient(least + delta * step + top, width)
        code = clamp(nearest_integer(new * (values - minimum)), 0.0, top)
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
        error = tl.sum(weights * _sized(off, absolute), 2, keep_dims=True)
        better = solvable & (error < best)
        best = tl.where(better, error, best)
        factor = tl.where(better, new, factor)
        origin = tl.where(better, minimum, origin)
        scale = tl.where(better, new_scale, scale)
        minimum = tl.where(better, new_minimum, minimum)
    return tl.where(flat, 0.0, scale), minimum, tl.where(flat, 0.0, factor), origin


@triton.jit
def nonnegative(values, weights, top, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return `values` (.., n) >= 0 as integers from 0 to `top` and their scale (make_qp_quants)."""
    index = tl.arange(0, n)[None, :]
    largest = tl.max(values, 1, keep_dims=True)
    flat = largest < TINY
    largest = tl.where(flat, 1.0, largest)
    best_inverse = quotient(top, largest)
    off = values - nearest_integer(best_inverse * values) * quotient(1.0, best_inverse)
    best = tl.sum(weights * off * off, 1, keep_dims=True)
    for step in range(9):
        inverse = quotient(top + 0.1 * (step - 4), largest)
        code = tl.minimum(nearest_integer(inverse * values), top)
        off = values - code * quotient(1.0, inverse)
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
def largest_first(values, top, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return `values` (.., n) >= 0 as integers up to `top`, which the largest gets, and their
    scale, as K types are rounded to nearest.
    """
    largest = tl.max(values, 1, keep_dims=True)
    positive = largest > 0
    inverse = quotient(top, tl.where(positive, largest, 1.0))
    code = tl.minimum(nearest_integer(inverse * values), top)
    scale = tl.div_rn(largest, tl.zeros_like(largest) + top)
    return tl.where(positive, code, 0.0), tl.where(positive, scale, 0.0)


@triton.jit
def farthest_of(values, axis: tl.constexpr, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first of the values along `axis` that is farthest from zero."""
    index = tl.arange(0, n)[None, :]
    if axis == 2:
        index = index[:, None, :]
    size = tl.abs(values)
    index += tl.zeros_like(size).to(tl.int32)
    largest = tl.max(size, axis, keep_dims=True)
    first = tl.min(tl.where(size == largest, index, n), axis, keep_dims=True)
    return tl.sum(tl.where(index == first, values, 0.0), axis, keep_dims=True)


@triton.jit
def symmetric(values, weights, top, axis: tl.constexpr, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scale of groups along `axis`, codes from -top to top - 1, and the factor that the
    codes were found with (make_qx_quants).
    """
    farthest = farthest_of(values, axis, n)
    flat = tl.abs(farthest) < TINY
    farthest = tl.where(flat, 1.0, farthest)
    factor = quotient(-top, farthest)
    scale = tl.zeros_like(farthest)
    best = tl.zeros_like(farthest)
    for step in range(20):
        # The plain factor comes first, then the others around it; ggml counts from -9 to 9.
        around = tl.where(step == 0, 0.0, 0.1 * (step - 10))
        new = quotient(-(top + around), farthest)
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
def refined(values, weights, top, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scale of groups of n, codes from -top to top - 1 and improved one by one
    (make_q3_quants).
    """
    farthest = farthest_of(values, 2, n)
    flat = tl.abs(farthest) < TINY
    factor = quotient(-top, tl.where(flat, 1.0, farthest))
    code = clamp(nearest_integer(factor * values), -top, top - 1.0)
    sum_lx = tl.sum(weights * values * code, 2, keep_dims=True)
    sum_ll = tl.sum(weights * code * code, 2, keep_dims=True)
    index = tl.arange(0, n)[None, None, :]
    for step in range(5 * n):
        here = index == step % n
        value = tl.sum(tl.where(here, values, 0.0), 2, keep_dims=True)
        weight = tl.sum(tl.where(here, weights, 0.0), 2, keep_dims=True)
        old = tl.sum(tl.where(here, code, 0.0), 2, keep_dims=True)
        rest_lx = sum_lx - weight * value * old
        rest_ll = sum_ll - weight * old * old
        usable = rest_lx > 0
        new = tl.div_rn(value * rest_ll, tl.where(usable, rest_lx, 1.0))
        new = nearest_integer(clamp(new, -top, top - 1.0))
        rest_lx += weight * value * new
        rest_ll += weight * new * new
        better = usable & (rest_ll > 0) & (new != old)
        better = better & (rest_lx * rest_lx * sum_ll > sum_lx * sum_lx * rest_ll)
        code = tl.where(here & better, new, code)
        sum_lx = tl.where(better, rest_lx, sum_lx)
        sum_ll = tl.where(better, rest_ll, sum_ll)
    usable = (sum_ll > 0) & (flat == 0)
    return tl.where(usable, tl.div_rn(sum_lx, tl.where(usable, sum_ll, 1.0)), 0.0)


@triton.jit
def index_in(table, level):  # type: ignore[no-untyped-def]
    """Return the index of the nearest of 16 rising entries, as float32, ties to the larger."""
    index = tl.zeros_like(level)
    for i in tl.static_range(15):
        middle = (tl.load(table + i) + tl.load(table + i + 1)) * 0.5
        index += (level >= middle).to(tl.float32)
    return index


@triton.jit
def _entry_of(table, level):  # type: ignore[no-untyped-def]
    """The nearest entry itself."""
    entry = tl.zeros_like(level) + tl.load(table)
    for i in tl.static_range(15):
        low, high = tl.load(table + i), tl.load(table + i + 1)
        entry += (level >= (low + high) * 0.5).to(tl.float32) * (high - low)
    return entry


@triton.jit
def in_table(values, weights, table, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scale of groups of n whose levels are a table's (quantize_row_iq4_nl_impl)."""
    farthest = farthest_of(values, 2, n)
    flat = tl.abs(farthest) < TINY
    farthest = tl.where(flat, 1.0, farthest)
    least = tl.load(table)
    scale = tl.zeros_like(farthest)
    best = tl.zeros_like(farthest)
    for step in range(16):
        plain = quotient(1.0, tl.div_rn(-farthest, tl.zeros_like(farthest) + least))
        factor = tl.where(step == 0, plain, quotient(step - 8 + least, farthest))
        entry = _entry_of(table, factor * values)
        sum_qx = tl.sum(weights * entry * values, 2, keep_dims=True)
        sum_qq = tl.sum(weights * entry * entry, 2, keep_dims=True)
        usable = sum_qq > 0
        better = usable & ((sum_qx * sum_qx > best * sum_qq) | (step == 0))
        fitted = tl.div_rn(sum_qx, tl.where(usable, sum_qq, 1.0))
        scale = tl.where(better, fitted, scale)
        best = tl.where(better, fitted * sum_qx, best)
    return tl.where(flat, 0.0, scale)
