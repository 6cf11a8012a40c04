"""Round scales in place as blocks store them, compiled by numba."""

from __future__ import annotations

import numpy as np

from quantkit.gptq.compiled import numba


@numba.njit(nogil=True, cache=True)
def round_to_half(x):  # type: ignore[no-untyped-def]
    """Round the float32 array `x` in place to the nearest float16, ties to even; to the largest
    finite one where it overflows.
    """
    bits = x.view(np.int32)
    for i in range(x.size):
        size = bits[i] & 0x7FFFFFFF
        if size < 0x38800000:  # subnormal: multiples of 2^-24
            x[i] = np.rint(x[i] * np.float32(16777216.0)) * np.float32(5.9604644775390625e-08)
        else:
            odd = (size >> 13) & 1
            size = min((size + 0xFFF + odd) & ~0x1FFF, 0x477FE000)
            bits[i] = size | (bits[i] & ~0x7FFFFFFF)


@numba.njit(nogil=True, cache=True)
def round_to_power(x):  # type: ignore[no-untyped-def]
    """Round the float32 array `x` in place to the nearest power of two that a byte stores
    (`ggml.e8m0`), without its sign.
    """
    bits = x.view(np.int32)
    for i in range(x.size):
        size = bits[i] & 0x7FFFFFFF
        if size < 0x00600000:
            bits[i] = 0x00400000 if size >= 0x00300000 else 0x00200000
        else:
            bits[i] = min((size + 0x00400000) & 0x7F800000, 253 << 23)
