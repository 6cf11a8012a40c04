"""Search the scales of codebook types where ggml is not asked for them: on a GPU.

ggml's search looks up the table for every candidate, which takes a CPU 200 to 500 ns a weight. Here
every weight is put onto the nearest value that any entry has, which is close enough to rank scales;
the entries are left to whoever has the scales.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.ggml.codebooks import BLOCK, CODEBOOKS, Codebook, Codes
from quantkit.ggml.types import QuantType

REACHES = tuple(0.55 + 0.05 * i for i in range(16))  # largest weight of a group, in largest values
_AT_ONCE = 1 << 22  # weights: a candidate takes several times their size


def start(book: Codebook, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Return packed rows uint8 (n_rows, row_bytes) with scales for float32 `weight` (n_rows,
    n_columns) and the first entry everywhere. `importance` is float32 (n_columns,), or (n_experts,
    n_columns) for as many rows of each expert, or None where all columns count the same.

    Raises QuantkitError when weights are NaN, infinite, or too large for the scales.
    """
    n_rows, n_columns = weight.shape
    if importance is None:
        importance = torch.ones(n_columns, device=weight.device)
    scale = group_scales(book, weight, importance.view(-1, n_columns))
    multipliers = torch.tensor(book.multipliers, device=weight.device)
    d = (scale.view(n_rows, -1, BLOCK // book.group).amax(-1) / multipliers[-1]).half().float()
    if not bool(torch.isfinite(d).all() & torch.isfinite(weight).all()):
        raise QuantkitError(
            f"Quantizing to {book.qtype} gave invalid blocks.",
            "The weights hold NaN or infinite values, or are too large for its scales.",
        )
    wanted = scale / d.repeat_interleave(BLOCK // book.group, 1).clamp_min(1e-30)
    integer = torch.bucketize(wanted, (multipliers[1:] + multipliers[:-1]) / 2)
    entry, signs = (
        torch.zeros((n_rows, n_columns // n), dtype=kind, device=weight.device)
        for n, kind in ((book.width, torch.int16), (8, torch.uint8))
    )
    return book.pack(Codes(entry, signs, integer.to(torch.int16), d))


def group_scales(book: Codebook, weight: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the scale of every group that is best by `shares`, importances float32 (n_experts,
    n_columns): float32 (n_rows, n_groups).
    """
    if weight.is_cuda:
        from quantkit.ggml import codebook_scales_cuda  # needs triton

        lists = value_lists(book.qtype)
        return codebook_scales_cuda.group_scales(book, weight, shares, lists, REACHES)
    return in_torch(book, weight, shares)


def in_torch(book: Codebook, weight: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Do `group_scales` in torch: the reference."""
    found = []
    step = max(1, _AT_ONCE // weight.shape[1])
    for own, share in zip(weight.chunk(len(shares)), shares, strict=True):
        weights = share.view(-1, book.group)
        found += [_rows(book, rows, weights) for rows in own.split(step)]
    return torch.cat(found)


def _rows(book: Codebook, weight: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    groups = weight.unflatten(1, (-1, book.group))
    largest = groups.abs().amax(-1)
    groups = groups.abs() if book.has_signs else groups
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    for values in value_lists(book.qtype):
        levels = torch.tensor(values, device=weight.device)
        middles, top = (levels[1:] + levels[:-1]) / 2, max(map(abs, values))
        for reach in REACHES:
            inverse = top * reach / largest.clamp_min(1e-30)
            near = levels[torch.bucketize(groups * inverse[..., None], middles)]
            along, power = (groups * near * shares).sum(-1), (near * near * shares).sum(-1)
            fitted = along / power.clamp_min(1e-30)
            better = (along > 0) & (fitted * along > best)
            best = torch.where(better, fitted * along, best)
            scale = torch.where(better, fitted, scale)
    return scale


@cache
def value_lists(qtype: QuantType) -> tuple[tuple[float, ...], ...]:
    """Return the values that entries have, rising; of a table of two halves those of each."""
    book = CODEBOOKS[qtype]
    halves = np.split(book.entries, 2) if book.halves else [book.entries]
    return tuple(tuple(map(float, np.unique(half))) for half in halves)
