"""The search for the scales of codebook types as a Triton kernel: `quantkit.ggml.codebook_scales`
says what is computed, and has the same in torch. Imported only where weights are on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.ggml.codebooks import Codebook
from quantkit.ggml.searches_cuda import tl, triton

_TILE, _WARPS = 2048, 4  # weights of one program


@triton.jit(do_not_specialize=["n_all", "per_row", "rows_each", "n_reaches"])
def _search(  # type: ignore[no-untyped-def]
    weight,
    shares,
    scale,
    values,
    n_all,
    per_row,
    rows_each,
    first_reach,
    reach_step,
    n_reaches,
    has_signs: tl.constexpr,
    n_lists: tl.constexpr,
    n_values: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
):
    """Groups first..first + tile; `values` (n_lists, n_values) rise, in each list."""
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    real = at < n_all
    row = at // per_row
    column = tl.arange(0, group)[None, :]
    known = real[:, None] & (column >= 0)
    x = tl.load(weight + at[:, None] * group + column, mask=known, other=0.0)
    own = (row // rows_each) * per_row + at % per_row
    share = tl.load(shares + own[:, None] * group + column, mask=known, other=0.0)
    largest = tl.max(tl.abs(x), 1)
    if has_signs:
        x = tl.abs(x)
    best, found = tl.zeros_like(largest), tl.zeros_like(largest)
    for half in tl.static_range(n_lists):
        first = tl.load(values + half * n_values)
        last = tl.load(values + half * n_values + n_values - 1)
        top = tl.maximum(tl.abs(first), tl.abs(last))
        for step in range(n_reaches):
            inverse = top * (first_reach + reach_step * step) / tl.maximum(largest, 1e-30)
            level = x * inverse[:, None]
            near = tl.zeros_like(x) + first
            for i in tl.static_range(1, n_values):
                lower = tl.load(values + half * n_values + i - 1)
                upper = tl.load(values + half * n_values + i)
                near = tl.where(level > (lower + upper) / 2, upper, near)
            along = tl.sum(x * near * share, 1)
            power = tl.sum(near * near * share, 1)
            fitted = along / tl.maximum(power, 1e-30)
            better = (along > 0) & (fitted * along > best)
            best = tl.where(better, fitted * along, best)
            found = tl.where(better, fitted, found)
    tl.store(scale + at, found, mask=real)


def group_scales(
    book: Codebook,
    weight: torch.Tensor,
    shares: torch.Tensor,
    lists: Sequence[Sequence[float]],
    reaches: Sequence[float],
    *,
    only_compile: bool = False,
) -> torch.Tensor:
    """Return the scales of groups, float32 (n_rows, n_groups), of float32 (n_rows, n_columns);
    `shares` are importances, (n_experts, n_columns), `lists` the values of entries, `reaches`
    evenly apart. To compile only returns nothing of use.
    """
    n_rows, n_columns = weight.shape
    per_row = n_columns // book.group
    tile = _TILE // book.group
    scale = torch.empty((n_rows, per_row), device=weight.device)
    _search.run(
        weight.contiguous(),
        shares.contiguous(),
        scale,
        torch.tensor(lists, device=weight.device),
        scale.numel(),
        per_row,
        n_rows // len(shares),
        reaches[0],
        reaches[1] - reaches[0],
        len(reaches),
        has_signs=book.has_signs,
        n_lists=len(lists),
        n_values=len(lists[0]),
        group=book.group,
        tile=tile,
        num_warps=_WARPS,
        grid=(triton.cdiv(scale.numel(), tile),),
        warmup=only_compile,
    )
    return scale
