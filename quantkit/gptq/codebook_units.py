"""The best codes of eight columns under a metric, of many rows at once: torch, on any device.

A unit's codes are those of a short list that cost least by the whole metric M, e M eᵀ. The list is
made by M's diagonal over all entries of the table, with the best signs and, where those must be
even, the cheapest wrong one; the listed ones get signs by the whole metric, flip by flip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.ggml.codebooks import UNIT, Codebook

N_LISTED = {8: 3, 4: 2}  # entries that the whole metric compares, by the width of an entry
N_ROUNDS = 2  # of single sign flips, or of pairs where signs are even
_AT_ONCE = 1 << 24  # rows times entries that are looked at together


@dataclass(frozen=True)
class Chosen:
    """Codes of one unit of many rows: `levels` float32 (n_rows, 8), signed, and `entry` int64
    (n_rows, 8 / width).
    """

    levels: torch.Tensor
    entry: torch.Tensor


def choose(
    book: Codebook, target: torch.Tensor, metric: torch.Tensor, half: torch.Tensor
) -> Chosen:
    """Return codes whose levels v are near to wanted ones t, float32 (n_rows, 8): (v - t) M (v -
    t)ᵀ is small for the metric M, float32 (8, 8). `half`, int64 (n_rows,), is the half of the table
    that a row may use, where the codebook asks for one.
    """
    step = max(1, _AT_ONCE // len(book.entries))
    parts = [
        _choose(book, target[i : i + step], metric, half[i : i + step])
        for i in range(0, len(target), step)
    ]
    return Chosen(torch.cat([p.levels for p in parts]), torch.cat([p.entry for p in parts]))


def sign_bytes(levels: torch.Tensor) -> torch.Tensor:
    """Return the byte of signs of units, float32 (..., 8) -> uint8 (...)."""
    bits = torch.arange(UNIT, device=levels.device)
    return ((levels < 0).long() << bits).sum(-1).to(torch.uint8)


def _choose(
    book: Codebook, target: torch.Tensor, metric: torch.Tensor, half: torch.Tensor
) -> Chosen:
    table = torch.from_numpy(book.entries).to(target.device)
    sizes = target.abs() if book.has_signs else target
    share = 2 * metric.diagonal() * sizes
    odd = ((target < 0).sum(1) % 2 == 1)[:, None]
    lists = []
    for own in torch.arange(UNIT, device=target.device).split(book.width):
        cost = table.square() @ metric.diagonal()[own] - share[:, own] @ table.T
        if book.halves:
            upper = torch.arange(len(table), device=target.device) >= len(table) // 2
            cost = cost.masked_fill(upper != half[:, None].bool(), torch.inf)
        costs = [cost]
        if book.signs_are_even:
            wrong = torch.stack([share[:, i, None] * table[:, k] for k, i in enumerate(own)])
            changed = torch.where(odd, cost + 2 * wrong.amin(0), cost)
            costs = [changed] if book.width == UNIT else [cost, changed]
        n = N_LISTED[book.width]
        lists.append(torch.cat([c.topk(n, 1, largest=False).indices for c in costs], 1))
    entry = lists[0][..., None]
    if len(lists) > 1:  # all pairs of what is listed for the halves
        one, other = lists[0][:, :, None], lists[1][:, None, :]
        entry = torch.stack(torch.broadcast_tensors(one, other), -1).flatten(1, 2)
    levels, cost = _signed(book, table[entry].flatten(2), target[:, None], metric)
    if len(lists) > 1 and book.signs_are_even:  # one half has the wrong sign, or none
        wrong = torch.arange(lists[0].shape[1], device=target.device) >= N_LISTED[book.width]
        n_wrong = (wrong[:, None].long() + wrong).flatten()
        cost = cost.masked_fill(n_wrong != odd.long(), torch.inf)
    best = cost.argmin(1)[:, None, None]
    return Chosen(
        levels.take_along_dim(best, 1).squeeze(1), entry.take_along_dim(best, 1).squeeze(1)
    )


def _signed(
    book: Codebook, sizes: torch.Tensor, target: torch.Tensor, metric: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes (n_rows, n, 8) with signs that cost little by the whole metric, and that cost."""
    levels = torch.where(target < 0, -sizes, sizes) if book.has_signs else sizes
    slope = (levels - target) @ metric
    cost = ((levels - target) * slope).sum(-1)
    if not book.has_signs:
        return levels, cost

    def flip(where: torch.Tensor) -> None:
        nonlocal levels, slope
        step = torch.where(where, -2 * levels, 0.0)
        levels, slope = levels + step, slope + step @ metric

    columns = torch.arange(UNIT, device=target.device)
    if book.signs_are_even:
        odd = ((target < 0).sum(-1) % 2 == 1).expand(cost.shape)
        gain, column = _of_flips(levels, slope, metric).min(-1)
        cost = cost + torch.where(odd, gain, 0.0)
        flip((columns == column[..., None]) & odd[..., None])
    for _ in range(N_ROUNDS):
        gains = _of_flips(levels, slope, metric)
        if book.signs_are_even:
            both = 8 * levels[..., :, None] * levels[..., None, :] * metric
            pairs = gains[..., :, None] + gains[..., None, :] + both
            lower = (columns[:, None] >= columns).expand(pairs.shape)
            gain, which = pairs.masked_fill(lower, torch.inf).flatten(-2).min(-1)
            where = (columns == which[..., None] // UNIT) | (columns == which[..., None] % UNIT)
        else:
            gain, which = gains.min(-1)
            where = columns == which[..., None]
        good = gain < 0
        cost = cost + torch.where(good, gain, 0.0)
        flip(where & good[..., None])
    return levels, cost


def _of_flips(levels: torch.Tensor, slope: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """What each sign's flip alone adds to the cost."""
    return 4 * levels * (levels * metric.diagonal() - slope)
