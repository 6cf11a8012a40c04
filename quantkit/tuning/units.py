"""Which point of a codebook is nearest to eight wanted levels: torch, on any device, the reference.

A point is an entry of the table, or two of four columns, with signs as the type allows them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.ggml.codebooks import UNIT, Codebook
from quantkit.gptq.codebook_units import sign_bytes

_AT_ONCE = 1 << 26  # units times entries that are looked at together


@dataclass(frozen=True)
class Points:
    """Points of units: `entry` int16 (n_units, 8 / width), `signs` uint8 (n_units,)."""

    entry: torch.Tensor
    signs: torch.Tensor


def nearest(book: Codebook, target: torch.Tensor, half: torch.Tensor) -> Points:
    """Return the points nearest to levels float32 (n_units, 8). `half`, int64 (n_units,), is the
    half of the table that a unit may use, where the codebook asks for one.
    """
    step = max(1, _AT_ONCE // len(book.entries))
    parts = [
        _nearest(book, target[i : i + step], half[i : i + step])
        for i in range(0, len(target), step)
    ]
    return Points(torch.cat([p.entry for p in parts]), torch.cat([p.signs for p in parts]))


def _nearest(book: Codebook, target: torch.Tensor, half: torch.Tensor) -> Points:
    table = torch.from_numpy(book.entries).to(target.device)
    sizes = target.abs() if book.has_signs else target
    norms = table.square().sum(1)
    columns = torch.arange(UNIT, device=target.device).split(book.width)
    costs = [norms - 2 * (sizes[:, own] @ table.T) for own in columns]
    if book.halves:
        upper = torch.arange(len(table), device=target.device) >= len(table) // 2
        costs = [cost.masked_fill(upper != half[:, None].bool(), torch.inf) for cost in costs]
    found = [cost.min(1) for cost in costs]
    entry = torch.stack([f.indices for f in found], 1)
    signs = sign_bytes(target) if book.has_signs else torch.zeros_like(half, dtype=torch.uint8)
    if book.signs_are_even:
        odd = (target < 0).sum(1) % 2 == 1
        added = [_least_flip(sizes[:, own], table) for own in columns]
        wrong = [(cost + a).min(1) for cost, a in zip(costs, added, strict=True)]
        # One of the parts has a wrong sign: that which is cheaper so, beside the other's best.
        extra = torch.stack([w.values - f.values for w, f in zip(wrong, found, strict=True)], 1)
        which = extra.argmin(1)
        changed = torch.stack([w.indices for w in wrong], 1)
        own = torch.arange(entry.shape[1], device=target.device) == which[:, None]
        entry = torch.where(odd[:, None] & own, changed, entry)
        flips = (sizes * table[entry].flatten(1)).unflatten(1, (-1, book.width))
        flips = flips.masked_fill(~own[..., None], torch.inf).flatten(1)
        bit = (1 << flips.argmin(1)).to(torch.uint8)
        signs = torch.where(odd, signs ^ bit, signs)
    return Points(entry.to(torch.int16), signs)


def _least_flip(sizes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What the cheapest wrong sign adds to the squared distance of every entry."""
    found = sizes[:, :1] * table[:, 0]
    for i in range(1, table.shape[1]):
        found = torch.minimum(found, sizes[:, i : i + 1] * table[:, i])
    return 4 * found
