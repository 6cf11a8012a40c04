"""Sums of outer products of many experts on an NVIDIA GPU, in Triton: one launch, where a loop over
128 experts leaves the GPU waiting for the host. Imported only where inputs are on a GPU.
"""

from __future__ import annotations

import torch

from quantkit.ggml.searches_cuda import tl, triton

_TILE = 128  # rows and columns of a matrix that a program sums
_DEPTH = 64  # tokens at a time


@triton.jit
def _add_outers(  # type: ignore[no-untyped-def]
    sums,
    x,
    bounds,
    share,
    n,
    row_step,
    tile: tl.constexpr,
    depth: tl.constexpr,
):
    first, second, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if second < first:
        return  # below the diagonal
    left = first * tile + tl.arange(0, tile)
    right = second * tile + tl.arange(0, tile)
    begin, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    total = tl.zeros((tile, tile), tl.float32)
    for start in range(begin, end, depth):
        rows = start + tl.arange(0, depth)
        at = x + rows.to(tl.int64)[:, None] * row_step
        inside = (rows < end)[:, None]
        a = tl.load(at + left[None, :], mask=inside & (left < n)[None, :], other=0.0)
        b = tl.load(at + right[None, :], mask=inside & (right < n)[None, :], other=0.0)
        # Products of 16-bit floats are exact in float32, the sums are float32's.
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    place = sums + expert.to(tl.int64) * n * n + left[:, None] * n + right[None, :]
    inside = (left < n)[:, None] & (right < n)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + share * total, mask=inside)


def add_outers(hessians: torch.Tensor, x: torch.Tensor, bounds: torch.Tensor, share: float) -> None:
    """Do what `quantkit.statistics.hessian.add_outers` says, in one launch.

    `hessians` (n_experts, n, n) are contiguous, as are the rows of `x`.
    """
    n_experts, n, _ = hessians.shape
    n_tiles = triton.cdiv(n, _TILE)
    x = x.contiguous()
    _add_outers[(n_tiles, n_tiles, n_experts)](
        hessians,
        x,
        bounds,
        share,
        n,
        x.stride(0),
        tile=_TILE,
        depth=_DEPTH,
        num_warps=8,
        num_stages=3,
    )
